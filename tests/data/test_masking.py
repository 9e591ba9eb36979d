"""Masks and sample order: statistics, purity, independence of how the work is cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sas.data.masking import bernoulli, hash_u64, mask_tokens

V, MASK, SPECIAL = 1000, 4, (0, 1, 2, 4)


OPTIONS = {"mask_prob": 0.15, "vocab_size": V, "mask_id": MASK, "special_ids": SPECIAL}


def tokens_of(n, s, seed=0, low=5):
    return np.random.default_rng(seed).integers(low, V, (n, s)).astype(np.uint16)


def within(count, total, probability):
    """Five standard deviations of a binomial."""
    return abs(count - total * probability) <= 5 * np.sqrt(total * probability * (1 - probability))


def splitmix(state):
    """splitmix64's output function as in its reference implementation, with Python integers."""
    z = (state + 0x9E3779B97F4A7C15) % 2**64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z >> 31)


def test_hash_agrees_with_python_integers_and_is_frozen():
    # The published first output of splitmix64 from state 0.
    assert splitmix(0) == 0xE220A8397B1DCDAF
    for keys in [(0,), (1, 2, 3), (2**64 - 1, 5), (-1, 7)]:
        state = 0
        for key in keys:
            state = splitmix(state ^ (key * 0x94D049BB133111EB % 2**64))
        assert int(hash_u64(*keys)[0]) == state
    # Masks of old runs must stay what they were.
    assert int(hash_u64(1, 2, 3)[0]) == int(hash_u64(np.int64(1), np.array([2]), 3)[0]) == 1939369434633671207


def test_hash_broadcasts_and_avalanches():
    rows, columns = np.arange(7)[:, None], np.arange(5)[None]
    table = hash_u64(3, rows, columns)
    assert table.shape == (7, 5) and table[4, 2] == hash_u64(3, 4, 2)[0]
    values = hash_u64(9, np.arange(20_000))
    assert len(set(values.tolist())) == 20_000
    flipped = np.bitwise_count(values ^ hash_u64(9, np.arange(20_000) ^ 1))
    assert abs(flipped.mean() - 32) < 0.2
    for bit in range(64):
        assert within(int((values >> np.uint64(bit) & np.uint64(1)).sum()), 20_000, 0.5)


def test_bernoulli_is_exact_at_both_ends():
    bits = np.array([0, 2**64 - 1], dtype=np.uint64)
    assert not bernoulli(bits, 0.0).any() and bernoulli(bits, 1.0).all()


def test_mask_statistics():
    tokens = tokens_of(500, 400)
    inputs, selected = mask_tokens(tokens, np.arange(500), 0, 1, **OPTIONS)
    assert inputs.dtype == np.int64 and selected.dtype == bool
    assert (inputs[~selected] == tokens[~selected]).all()
    total = tokens.size
    assert within(selected.sum(), total, 0.15)
    for position in (0, 200, 399):
        assert within(selected[:, position].sum(), 500, 0.15)
    chosen, original = inputs[selected], tokens[selected]
    masked = chosen == MASK
    kept = chosen == original
    # A random replacement is [MASK] or the original with probability 1/V each.
    assert within(masked.sum(), selected.sum(), 0.8 + 0.1 / V)
    assert within(kept.sum(), selected.sum(), 0.1 + 0.1 / V)
    random = chosen[~masked & ~kept]
    counts = np.bincount(random, minlength=V)
    assert counts[MASK] == 0 and len(counts) == V
    others = np.delete(counts, MASK)
    chi2 = ((others - others.mean()) ** 2 / others.mean()).sum()
    assert abs(chi2 - (V - 2)) < 5 * np.sqrt(2 * (V - 2))
    assert counts[:4].sum() > 0  # the whole vocabulary, special tokens included


def test_special_tokens_and_extremes():
    tokens = tokens_of(20, 50, low=0)
    inputs, selected = mask_tokens(tokens, np.arange(20), 0, 0, **(OPTIONS | {"mask_prob": 1.0}))
    special = np.isin(tokens, SPECIAL)
    assert special.any() and (selected == ~special).all()
    assert (inputs[special] == tokens[special]).all()
    assert not mask_tokens(tokens, np.arange(20), 0, 0, **(OPTIONS | {"mask_prob": 0.0}))[1].any()
    with pytest.raises(ValueError):
        mask_tokens(tokens, np.arange(20), 0, 0, **(OPTIONS | {"mask_prob": 1.5}))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 40), st.integers(0, 2**40), st.integers(0, 2**62), st.data())
def test_masks_depend_on_seed_epoch_sample_and_position_only(n, s, epoch, seed, data):
    tokens = tokens_of(n, s)
    samples = np.array(data.draw(st.lists(st.integers(0, 2**62), min_size=n, max_size=n)))
    whole = mask_tokens(tokens, samples, epoch, seed, **OPTIONS)
    order = np.array(data.draw(st.permutations(range(n))))
    for part in np.array_split(order, 3):
        epochs = np.full(len(part), epoch)
        for got, expected in zip(mask_tokens(tokens[part], samples[part], epochs, seed, **OPTIONS), whole, strict=True):
            np.testing.assert_array_equal(got, expected[part])


def test_every_argument_of_the_hash_matters():
    tokens = tokens_of(4, 500)
    _, base = mask_tokens(tokens, np.arange(4), 0, 0, **OPTIONS)
    for samples, epoch, seed in ((np.arange(4) + 4, 0, 0), (np.arange(4), 1, 0), (np.arange(4), 0, 1)):
        _, other = mask_tokens(tokens, samples, epoch, seed, **OPTIONS)
        assert within((base & other).sum(), 2000, 0.0225)
