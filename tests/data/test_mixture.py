"""Mixtures: exact shares, every part in whole epochs, the same stream whatever the batches and ranks."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_sas.core.cli import InputError
from megatron_sas.data.mixture import MixedData, open_training_data, stream_samples
from megatron_sas.data.mlm_dataset import MLMDataset
from megatron_sas.data.packed import OPEN_FILES, PackedData

SEED = 5


ROOT = Path(__file__).resolve().parents[2]


def open_parts(make_packed, weights):
    prefixes = [str(make_packed(n=n, seed=n, name=f"part{n}")) for n in (11, 5)]
    return prefixes, open_training_data(list(zip(prefixes, weights, strict=True)))


def windows(data, steps, world_size=1):
    """Per step, micro-batches in global order."""
    options = {"seed": SEED, "mask_prob": 0.3, "global_batch_size": 16, "micro_batch_size": 2}
    for step in steps:
        ranks = [MLMDataset(data, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
        batches = [batch for rank in ranks for batch in rank.window(step).micro_batches]
        yield sorted(batches, key=lambda batch: batch.index)


@pytest.mark.parametrize("weights", [(1.0, 3.0), (None, None)])
def test_rows_come_from_their_parts_for_any_number_of_ranks(make_packed, weights):
    prefixes, data = open_parts(make_packed, weights)
    parts = [PackedData(prefix) for prefix in prefixes]
    steps = (0, 1, 4096, 9999)
    for one, two, step in zip(windows(data, steps), windows(data, steps, 2), steps, strict=True):
        samples, _ = stream_samples(data, step, 16, SEED)
        assert np.concatenate([batch.sample_ids for batch in one]).tolist() == samples.tolist()
        for a, b in zip(one, two, strict=True):
            for name in ("sample_ids", "input_ids", "masked_positions", "labels", "heads"):
                assert np.array_equal(getattr(a, name), getattr(b, name))
            for row, sample in enumerate(a.sample_ids.tolist()):
                part, number = (parts[0], sample) if sample < 11 else (parts[1], sample - 11)
                original = part.tokens[number].astype(np.int64)
                masked = a.masked_positions[a.masked_positions // 16 == row].numpy() % 16
                assert np.array_equal(a.labels[a.masked_positions // 16 == row], original[masked])
                kept = np.setdiff1d(np.arange(16), masked)
                assert np.array_equal(a.input_ids[row][kept], original[kept])
                assert np.array_equal(a.heads[row], part.heads[number])


def test_without_weights_every_sequence_comes_once_an_epoch(make_packed):
    _, data = open_parts(make_packed, (None, None))
    ids = [sample for step in range(3) for sample in stream_samples(data, step, 16, SEED)[0]]
    assert sorted(ids) == sorted([*range(16)] * 3)


def test_one_part_is_the_plain_data(make_packed):
    prefix = str(make_packed())
    assert isinstance(open_training_data([(prefix, None)]), PackedData)
    assert isinstance(open_training_data([(prefix, 2.0)]), PackedData)


def test_empty_parts_are_passed_over(make_packed):
    prefixes, data = open_parts(make_packed, (None, None))
    empty = make_packed(n=0, name="empty")
    for place in range(3):
        given = [*prefixes[:place], str(empty), *prefixes[place:]]
        found = open_training_data([(prefix, None) for prefix in given])
        assert found.fingerprint == data.fingerprint and found.sizes == [11, 5]
    one = open_training_data([(str(empty), None), (prefixes[1], None)])
    assert isinstance(one, PackedData) and one.prefix == prefixes[1]
    for parts, message in (
        ([(str(empty), None)], r"empty.json: holds no sequence, .*; leave it out"),
        ([(str(empty), 3.0), (prefixes[0], 1.0)], r"empty.json: holds no sequence, .*; leave it out"),  # 3 of what?
        ([(str(empty), None)] * 2, r"data.train: .*empty and the others hold no sequence"),
    ):
        with pytest.raises(InputError, match=message):
            open_training_data(parts)


OPEN_MANY = """
import resource, sys
import numpy as np
from megatron_sas.data.mixture import open_training_data
hard = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
data = open_training_data([(sys.argv[2], None)] * 100)
assert data.heads[np.arange(0, len(data), 5)].shape == (100, 8)
print(resource.getrlimit(resource.RLIMIT_NOFILE))
"""


def test_more_parts_than_files_may_be_open(make_packed):
    prefix = str(make_packed(n=5, s=8))
    one = open_training_data([(prefix, None)])
    gc.collect()  # what earlier tests left open
    before = len(os.listdir("/proc/self/fd"))
    again = open_training_data([(prefix, None)])
    assert len(os.listdir("/proc/self/fd")) - before == OPEN_FILES
    assert np.array_equal(again.boundaries, one.boundaries) and again.deprels[0].tolist() == [0] * 8

    def run(hard):
        command = [sys.executable, "-c", OPEN_MANY, str(hard), prefix]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)

    done = run(600)
    assert done.stdout == "(600, 600)\n", done.stderr
    done = run(400)
    assert done.returncode == 1
    assert "data.train: 100 parts need 456 open files, but a process may have 400 (ulimit -Hn); merge" in done.stderr


def test_fingerprint_tells_parts_order_and_shares_apart(make_packed):
    prefixes, data = open_parts(make_packed, (1.0, 3.0))
    same = open_training_data(list(zip(prefixes, (2.0, 6.0), strict=True)))
    others = [
        open_training_data(list(zip(prefixes, (1.0, 2.0), strict=True))),
        open_training_data(list(zip(prefixes, (None, None), strict=True))),
        open_training_data(list(zip(prefixes[::-1], (3.0, 1.0), strict=True))),
    ]
    assert data.fingerprint == same.fingerprint
    assert len({data.fingerprint, *(other.fingerprint for other in others)}) == 4
    assert data.heads_fingerprint == same.heads_fingerprint != others[-1].heads_fingerprint
    data.verify()


def test_parts_that_do_not_fit_together(make_packed):
    parts = [PackedData(make_packed(s=16, name="a")), PackedData(make_packed(s=8, name="b"))]
    with pytest.raises(InputError, match=r"b has sequences of 8 tokens, .*a of 16"):
        MixedData(parts, [None, None])
