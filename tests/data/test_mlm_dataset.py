"""Windows: what is in them, that they do not depend on the world size, and their prefetching."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_sas.core.cli import InputError
from megatron_sas.data.masking import mask_tokens
from megatron_sas.data.mlm_dataset import SAMPLES_AT_ONCE, MLMDataset, masked_capacity, validation_batches
from megatron_sas.data.packed import PackedData
from megatron_sas.data.sampler import global_samples


def dataset(packed, rank=0, world_size=1, **options):
    options = {"seed": 3, "mask_prob": 0.3, "global_batch_size": 16, "micro_batch_size": 2} | options
    return MLMDataset(packed, rank=rank, world_size=world_size, **options)


def same(a, b):
    names = ("sample_ids", "input_ids", "masked_positions", "labels", "heads")
    return a.index == b.index and all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)


def test_fixed_shapes_fill_up_and_change_nothing(make_packed):
    packed = PackedData(make_packed())
    plain = dataset(packed, micro_batch_size=8).window(2)
    fixed = dataset(packed, micro_batch_size=8, fixed_shapes=True).window(2)
    assert fixed.num_masked == plain.num_masked
    for a, b in zip(plain.micro_batches, fixed.micro_batches, strict=True):
        count = len(a.labels)
        assert len(b.labels) == len(b.masked_positions) == masked_capacity(8 * 16, 0.3) == 128 > count
        assert same(a, replace(b, masked_positions=b.masked_positions[:count], labels=b.labels[:count]))
        assert set(b.labels[count:].tolist()) == {-100}
        assert set(b.masked_positions[count:].tolist()) == {0}


def test_capacity_is_hardly_ever_exceeded():
    """Against the binomial distribution: P(more) < 1e-8; the batch is then larger, not wrong."""
    for tokens, prob in ((16_384, 0.15), (2048, 0.15), (4096, 0.5)):
        capacity = masked_capacity(tokens, prob)
        assert capacity % 64 == 0
        assert capacity < tokens * prob + 6.1 * math.sqrt(tokens * prob * (1 - prob)) + 64
        assert 0.5 * math.erfc((capacity - tokens * prob) / math.sqrt(2 * tokens * prob * (1 - prob))) < 1e-8
    assert masked_capacity(32, 0.15) == 32


def test_window_content_against_plain_python(make_packed):
    packed = PackedData(make_packed())
    window = dataset(packed).window(5)
    samples, epochs = global_samples(5, 16, packed.num_sequences, 3)
    assert len(set(epochs)) == 2  # this batch spans two epochs
    assert window.step == 5 and len(window.micro_batches) == 8
    for j, batch in enumerate(window.micro_batches):
        assert batch.index == j
        positions, labels = [], []
        for row, (sample, epoch) in enumerate(zip(samples[2 * j : 2 * j + 2], epochs[2 * j : 2 * j + 2], strict=True)):
            inputs, selected = mask_tokens(
                packed.tokens[sample][None],
                np.array([sample]),
                int(epoch),
                3,
                mask_prob=0.3,
                vocab_size=33,
                mask_id=4,
                special_ids=(0, 2, 3, 4),
            )
            assert batch.sample_ids[row] == sample
            assert batch.input_ids[row].tolist() == inputs[0].tolist()
            assert batch.heads[row].tolist() == packed.heads[sample].tolist()
            for position in range(16):
                if selected[0, position]:
                    positions.append(row * 16 + position)
                    labels.append(int(packed.tokens[sample, position]))
        assert batch.masked_positions.tolist() == positions and batch.labels.tolist() == labels
        for name in ("sample_ids", "input_ids", "masked_positions", "labels", "heads"):
            assert getattr(batch, name).dtype == torch.int64
    assert window.num_masked == sum(len(batch.labels) for batch in window.micro_batches)


def test_micro_batches_do_not_depend_on_the_world_size(make_packed):
    packed = PackedData(make_packed())
    for step in (0, 1, 9):
        reference = {batch.index: batch for batch in dataset(packed).window(step).micro_batches}
        for world_size in (2, 4, 8):
            windows = [dataset(packed, rank, world_size).window(step) for rank in range(world_size)]
            batches = [batch for window in windows for batch in window.micro_batches]
            assert sorted(batch.index for batch in batches) == list(range(8))
            assert all(same(batch, reference[batch.index]) for batch in batches)
            assert [b.index for b in windows[1].micro_batches] == list(range(1, 8, world_size))
            assert sum(window.num_masked for window in windows) == dataset(packed).window(step).num_masked


def test_epochs_see_every_sample_once_with_fresh_masks(make_packed):
    packed = PackedData(make_packed(n=16))
    first, second = (dataset(packed).window(step).micro_batches for step in (0, 1))
    order = [torch.cat([batch.sample_ids for batch in batches]).tolist() for batches in (first, second)]
    assert sorted(order[0]) == sorted(order[1]) == list(range(16)) and order[0] != order[1]
    rows = [torch.cat([batch.input_ids for batch in batches]) for batches in (first, second)]
    assert not torch.equal(rows[0][order[0].index(0)], rows[1][order[1].index(0)])


def test_global_batch_must_divide(make_packed):
    with pytest.raises(InputError, match="global batch 16 is not a multiple of micro batch 3 × 2"):
        dataset(PackedData(make_packed()), micro_batch_size=3, world_size=2)


@pytest.mark.parametrize("total", [1, 4, 7, 11, 100])
def test_validation_covers_each_sequence_once_on_any_world_size(make_packed, total):
    packed = PackedData(make_packed())
    options = {"micro_batch_size": 2, "num_sequences": total, "seed": 0, "mask_prob": 0.5}
    expected = min(total, 11)
    labels = set()
    for world_size in (1, 2, 3):
        ranks = [list(validation_batches(packed, rank=r, world_size=world_size, **options)) for r in range(world_size)]
        assert len({len(batches) for batches in ranks}) == 1
        batches = [batch for rank in ranks for batch in rank]
        samples = [int(s) for batch in batches for s in batch.sample_ids if s >= 0]
        assert sorted(samples) == list(range(expected))
        labels.add(tuple(sorted(label for batch in batches for label in batch.labels.tolist())))
        for batch in batches:
            assert batch.input_ids.shape == (2, 16)
            filler = batch.sample_ids < 0
            assert (batch.heads[filler] == -1).all()
            assert not filler[batch.masked_positions // 16].any()
        again = list(validation_batches(packed, rank=0, world_size=world_size, **options))
        assert all(same(a, b) for a, b in zip(again, ranks[0], strict=True))
    assert len(labels) == 1


def test_samples_computed_for_many_steps_at_once_are_those_of_each(make_packed):
    packed = PackedData(make_packed())
    data = dataset(packed, global_batch_size=6, seed=5)
    at_once = SAMPLES_AT_ONCE // 6
    for step in (0, at_once - 1, at_once, 3 * at_once - 1, 1, 10**6):
        samples = torch.cat([batch.sample_ids for batch in data.window(step).micro_batches])
        assert samples.tolist() == global_samples(step, 6, packed.num_sequences, 5)[0].tolist()
