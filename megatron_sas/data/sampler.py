"""The order of samples as a pure function of (seed, epoch): a keyed permutation that is computed, never stored.

A balanced Feistel network with a hash as its round function is a bijection of [0, 4^h) for any hash; cycle walking
(Black and Rogaway, *Ciphers with Arbitrary Finite Domains*, CT-RSA 2002) restricts it to [0, n).
"""

from __future__ import annotations

import numpy as np

from megatron_sas.data.masking import hash_u64

_ROUNDS = 8
_ORDER = 0x6F726472  # keeps the order apart from every other use of the same seed


def _feistel(value: np.ndarray, half_bits: int, key: np.ndarray) -> np.ndarray:
    """One pass of the network over [0, 4^half_bits); `value` and `key` are uint64 (k,)."""
    shift, low = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = value >> shift, value & low
    for number in range(_ROUNDS):
        left, right = right, left ^ (hash_u64(key, number, right) & low)
    return (left << shift) | right


def permute(index: np.ndarray, n: int, seed: int, epoch: int | np.ndarray) -> np.ndarray:
    """Image of `index` under the permutation of [0, n) that belongs to (seed, epoch).

    Args:
        index: integers in [0, n), (k,). n: 1 to 2^62. epoch: one integer or (k,).

    Returns:
        int64 (k,). Memory is O(k), whatever n; the expected number of passes is below 4.
    """
    index = np.atleast_1d(np.asarray(index, dtype=np.int64))
    if not 1 <= n <= 1 << 62:
        raise ValueError(f"n = {n} is not in [1, 2^62]")
    if index.size and (index.min() < 0 or index.max() >= n):
        raise ValueError(f"index out of range [0, {n})")
    half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
    key = np.broadcast_to(hash_u64(_ORDER, seed, epoch), index.shape)
    result = _feistel(index.astype(np.uint64), half_bits, key)
    outside = np.flatnonzero(result >= np.uint64(n))
    while outside.size:
        result[outside] = _feistel(result[outside], half_bits, key[outside])
        outside = outside[result[outside] >= np.uint64(n)]
    return result.astype(np.int64)


def global_samples(step: int, global_batch_size: int, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples of global batch `step` of an endless stream of epochs over n samples.

    The batch covers stream positions [step·G, (step+1)·G); position p belongs to epoch p // n.

    Returns:
        sample ids (G,) int64 in [0, n) and their epochs (G,) int64.
    """
    position = np.arange(step * global_batch_size, (step + 1) * global_batch_size, dtype=np.int64)
    epochs = position // n
    return permute(position % n, n, seed, epochs), epochs
