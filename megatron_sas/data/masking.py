"""Masking as a pure function of (seed, epoch, sample, position): no generator state, so nothing to save or restore.

The bits come from a chain of splitmix64 finalisers (Steele, Lea and Flood, *Fast Splittable Pseudorandom Number
Generators*, OOPSLA 2014), which is integer arithmetic modulo 2^64 and the same on every machine and library version.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_MASKING = 0x6D61736B  # keeps these bits apart from every other use of the same seed
_LOW = np.uint64(0xFFFFFFFF)

Split = tuple[float, float, float]
"""Shares of the selected tokens that become [MASK], become a random token, and stay; they add up to 1."""
BERT_SPLIT: Split = (0.8, 0.1, 0.1)


def _mix(value: np.ndarray) -> np.ndarray:
    """The splitmix64 finaliser, in place where possible."""
    value = value + _GOLDEN
    value ^= value >> np.uint64(30)
    value *= _MIX_1
    value ^= value >> np.uint64(27)
    value *= _MIX_2
    value ^= value >> np.uint64(31)
    return value


def _as_u64(key: int | np.ndarray) -> np.ndarray:
    """Integers as uint64 arrays; negative ones wrap modulo 2^64."""
    if isinstance(key, int):
        return np.array([key & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64)
    return np.atleast_1d(np.asarray(key)).astype(np.uint64)


def hash_u64(*keys: int | np.ndarray) -> np.ndarray:
    """Hash integers to 64 bits. Keys broadcast against each other; their order matters.

    Returns a uint64 array of the broadcast shape (at least one dimension; scalars give shape (1,)).
    """
    state = np.zeros(1, dtype=np.uint64)
    for key in keys:
        # The multiplication keeps small keys from meeting the state in its low bits only.
        state = _mix(state ^ (_as_u64(key) * _MIX_2))
    return state


def bernoulli(bits: np.ndarray, probability: float) -> np.ndarray:
    """True where the top 53 of 64 uniform bits, read as a fraction, lie below `probability` (exact at 0 and 1)."""
    return (bits >> np.uint64(11)) < np.uint64(round(probability * 2**53))


def mask_tokens(
    tokens: np.ndarray,
    samples: np.ndarray,
    epoch: int | np.ndarray,
    seed: int,
    *,
    mask_prob: float,
    vocab_size: int,
    mask_id: int,
    special_ids: Iterable[int],
    split: Split = BERT_SPLIT,
) -> tuple[np.ndarray, np.ndarray]:
    """BERT's masking (Devlin et al. 2019, section 3.1) with every token selected independently.

    Each token that is not special is selected with probability `mask_prob`; of the selected, by default, 80 % become
    `mask_id`, 10 % a token drawn uniformly from all `vocab_size` entries, 10 % stay. What is selected at one
    probability is selected at every larger one too, and is treated alike.

    Args:
        tokens: (n, S) integers. samples: (n,) int64, the sample numbers. epoch: one integer or (n,).
        mask_prob: in [0, 1]. vocab_size: without padding. special_ids: never selected.

    Returns:
        input_ids (n, S) int64 and selected (n, S) bool.
    """
    if not 0 <= mask_prob <= 1:
        raise ValueError(f"mask_prob {mask_prob} is not in [0, 1]")
    rows = hash_u64(_MASKING, seed, epoch, np.asarray(samples))[:, None]
    bits = hash_u64(rows, np.arange(tokens.shape[1])[None, :])
    selected = bernoulli(bits, mask_prob)
    for special in special_ids:
        selected &= tokens != special
    input_ids = tokens.astype(np.int64)
    positions = np.flatnonzero(selected)
    # Fresh bits, since the selection conditions those above. Low half: the action; high half: the new token.
    bits = hash_u64(bits.ravel()[positions], 1)
    action = bits & _LOW
    values = input_ids.ravel()[positions]
    replacement = (((bits >> np.uint64(32)) * np.uint64(vocab_size)) >> np.uint64(32)).astype(np.int64)
    values = np.where(action < np.uint64(round((split[0] + split[1]) * 2**32)), replacement, values)
    values = np.where(action < np.uint64(round(split[0] * 2**32)), mask_id, values)
    input_ids.ravel()[positions] = values
    return input_ids, selected
