"""The loader prepares the same windows, a bounded number ahead, and ends its thread."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from megatron_sas.core.cli import InputError
from megatron_sas.data.loader import PrefetchLoader
from megatron_sas.data.mlm_dataset import MLMDataset
from megatron_sas.data.packed import PackedData


def dataset(packed, rank=0, world_size=1, **options):
    options = {"seed": 3, "mask_prob": 0.3, "global_batch_size": 16, "micro_batch_size": 2} | options
    return MLMDataset(packed, rank=rank, world_size=world_size, **options)


def same(a, b):
    names = ("sample_ids", "input_ids", "masked_positions", "labels", "heads")
    return a.index == b.index and all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)


def test_prefetching_gives_the_same_windows_in_order(make_packed):
    data = dataset(PackedData(make_packed()))
    with PrefetchLoader(data, 3, 9) as loader:
        for step, window in zip(range(3, 9), loader, strict=True):
            assert window.step == step
            assert all(same(a, b) for a, b in zip(window.micro_batches, data.window(step).micro_batches, strict=True))
        with pytest.raises(StopIteration):
            next(loader)


class Counting:
    """A dataset that counts its windows and fails at a step."""

    def __init__(self, data, fail_at=None):
        self.data, self.fail_at, self.made = data, fail_at, 0

    def window(self, step):
        if step == self.fail_at:
            raise InputError("file.bin: cut off")
        self.made += 1
        return self.data.window(step)


def test_prefetching_is_bounded_and_stops(make_packed):
    data = Counting(dataset(PackedData(make_packed())))
    threads = set(threading.enumerate())
    loader = PrefetchLoader(data, 0, 1000, depth=2)
    next(loader)
    end = time.monotonic() + 60
    while data.made < 4:  # one taken, two waiting, one in hand
        assert time.monotonic() < end
        time.sleep(0.01)
    time.sleep(0.2)
    assert data.made == 4
    loader.close()
    loader.close()
    assert set(threading.enumerate()) <= threads  # of which those of other tests may end meanwhile
    with pytest.raises(StopIteration):
        next(loader)


def test_prefetching_raises_in_the_consumer(make_packed):
    loader = PrefetchLoader(Counting(dataset(PackedData(make_packed())), fail_at=2), 0, 10)
    assert [next(loader).step, next(loader).step] == [0, 1]
    with pytest.raises(InputError, match="cut off"):
        next(loader)
    with pytest.raises(StopIteration):
        next(loader)


def test_empty_range(make_packed):
    assert list(PrefetchLoader(dataset(PackedData(make_packed())), 5, 5)) == []
