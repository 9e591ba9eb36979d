"""The order of samples: a bijection that mixes, computed anywhere."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from megatron_sas.data.sampler import MIXTURE_BLOCK, block_shares, global_samples, mixture_samples, permute


@pytest.mark.parametrize("n", [*range(1, 40), 63, 64, 65, 255, 256, 257, 1000, 4095, 4097, 65_537])
def test_permute_is_a_bijection(n):
    image = permute(np.arange(n), n, seed=7, epoch=n)
    assert image.dtype == np.int64
    np.testing.assert_array_equal(np.sort(image), np.arange(n))
    part = np.random.default_rng(0).integers(0, n, 10)
    np.testing.assert_array_equal(permute(part, n, 7, n), image[part])


def test_permute_mixes():
    n, epochs = 50, 4000
    first = permute(np.zeros(epochs, dtype=int), n, 3, np.arange(epochs))
    counts = np.bincount(first, minlength=n)
    assert ((counts - epochs / n) ** 2 / (epochs / n)).sum() < n - 1 + 5 * np.sqrt(2 * n)
    a, b = permute(np.arange(1000), 1000, 0, 0), permute(np.arange(1000), 1000, 0, 1)
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.15 and abs(np.corrcoef(a, np.arange(1000))[0, 1]) < 0.15
    assert (permute(np.arange(1000), 1000, 1, 0) != a).any()
    large = permute(np.array([0, 1, 2**61]), 2**62, 0, 0)
    assert (large >= 0).all() and len(set(large.tolist())) == 3


def test_permute_refuses_what_is_out_of_range():
    for index, n in (([3], 3), ([-1], 3), ([0], 0)):
        with pytest.raises(ValueError):
            permute(np.array(index), n, 0, 0)


@pytest.mark.parametrize(("n", "batch"), [(10, 4), (7, 7), (3, 8), (1, 2), (100, 32)])
def test_global_batches_run_through_whole_epochs(n, batch):
    steps = [global_samples(step, batch, n, 5) for step in range(3 * n)]
    samples = np.concatenate([s for s, _ in steps])
    epochs = np.concatenate([e for _, e in steps])
    np.testing.assert_array_equal(epochs, np.arange(3 * n * batch) // n)
    for epoch in range(3 * batch):
        np.testing.assert_array_equal(samples[epoch * n : (epoch + 1) * n], permute(np.arange(n), n, 5, epoch))
        assert sorted(samples[epochs == epoch]) == list(range(n))


SEED = 5


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([1.0], [65536]),
        ([1.0, 1.0, 2.0], [16384, 16384, 32768]),
        ([0.7, 0.3], [45875, 19661]),
        ([1.0, 1.0, 1.0], [21846, 21845, 21845]),
        ([1e-9, 1.0, 1e-9], [1, 65534, 1]),
    ],
)
def test_shares_of_a_block(weights, expected):
    assert block_shares(weights).tolist() == expected
    assert block_shares([3 * weight for weight in weights]).tolist() == expected


def test_every_block_has_the_exact_shares_and_every_part_whole_epochs():
    sizes, shares = [11, 7_000, 300_000], block_shares([1, 2, 5])
    ids, epochs = mixture_samples(0, 3 * MIXTURE_BLOCK, sizes, shares, SEED)
    parts = np.searchsorted(np.cumsum(sizes), ids, side="right")
    for block in range(3):
        here = parts[block * MIXTURE_BLOCK : (block + 1) * MIXTURE_BLOCK]
        assert np.bincount(here).tolist() == shares.tolist()
    offset = 0
    for part, size in enumerate(sizes):
        mine, when = ids[parts == part] - offset, epochs[parts == part]
        offset += size
        seen = Counter(zip(when.tolist(), mine.tolist(), strict=True))
        assert max(seen.values()) == 1  # never twice in an epoch
        per_epoch = np.bincount(when)
        assert (per_epoch[:-1] == size).all()
        assert len(per_epoch) == -(-3 * int(shares[part]) // size)
    # Shares also hold for parts of a block, within chance: no long runs of one part.
    for start in range(0, 3 * MIXTURE_BLOCK, 4096):
        count = np.bincount(parts[start : start + 4096], minlength=3)
        assert (abs(count - shares / 16) < 6 * np.sqrt(shares / 16)).all()


def test_any_step_at_once():
    sizes, shares = [100, 5], block_shares([9, 1])
    ids, epochs = mixture_samples(0, 200_000, sizes, shares, SEED)
    for batch, step in ((8, 24_999), (64, 1_024), (1_000, 65)):  # within, at the border of and across blocks
        some, when = mixture_samples(step, batch, sizes, shares, SEED)
        here = slice(step * batch, (step + 1) * batch)
        assert np.array_equal(some, ids[here]) and np.array_equal(when, epochs[here])
    far, _ = mixture_samples(10**12, 64, sizes, shares, SEED)
    assert len(far) == 64 and far.max() < 105
    assert not np.array_equal(mixture_samples(0, 1000, sizes, shares, 6)[0], ids[:1000])
