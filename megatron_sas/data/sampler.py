"""The order of samples as a pure function of (seed, epoch): a keyed permutation that is computed, never stored.

A balanced Feistel network with a hash as its round function is a bijection of [0, 4^h) for any hash; cycle walking
(Black and Rogaway, *Ciphers with Arbitrary Finite Domains*, CT-RSA 2002) restricts it to [0, n).
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from megatron_sas.data.masking import hash_u64

MIXTURE_BLOCK = 1 << 16  # positions of a mixture's stream in which every part has its exact share

_ROUNDS = 8
_ORDER = 0x6F726472  # keeps the order apart from every other use of the same seed
_MIXTURE = 0x6D697874  # and the choice of a mixture's parts


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


def block_shares(weights: Sequence[float]) -> np.ndarray:
    """How many of `MIXTURE_BLOCK` consecutive positions each part of a mixture gets: (K,) int64, in proportion to the
    weights (largest remainders), at least 1 each."""
    total = sum(map(Fraction, weights))
    exact = [Fraction(weight) * MIXTURE_BLOCK / total for weight in weights]
    shares = [max(1, int(share)) for share in exact]
    order = sorted(range(len(exact)), key=lambda part: (shares[part] - exact[part], part))
    for place in range(abs(MIXTURE_BLOCK - sum(shares))):
        if sum(shares) < MIXTURE_BLOCK:
            shares[order[place % len(order)]] += 1
        else:  # the least shares were raised to 1
            shares[int(np.argmax(shares))] -= 1
    return np.array(shares, dtype=np.int64)


def mixture_samples(
    step: int, global_batch_size: int, sizes: Sequence[int], shares: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Samples of global batch `step` of a mixture of parts with `sizes` samples.

    The stream is cut into blocks of `MIXTURE_BLOCK` positions. A keyed permutation of its block says which part a
    position belongs to and which of the part's samples it takes, so that nothing need be counted from the beginning.
    Each part goes through its own epochs, each in an order of its own.

    Args:
        sizes: K parts. shares: (K,) int64 from `block_shares`.

    Returns:
        sample ids (G,) int64 in [0, sum(sizes)), part after part, and the epochs (G,) int64 of the samples' parts.
    """
    position = np.arange(step * global_batch_size, (step + 1) * global_batch_size, dtype=np.int64)
    block, place = position // MIXTURE_BLOCK, position % MIXTURE_BLOCK
    place = permute(place, MIXTURE_BLOCK, _key(seed, 0), block)
    bounds, offsets = np.append(0, np.cumsum(shares)), np.append(0, np.cumsum(sizes))
    parts = np.searchsorted(bounds, place, side="right") - 1
    number = block * shares[parts] + place - bounds[parts]  # of the part's own stream
    samples, epochs = np.empty_like(number), np.empty_like(number)
    for part in np.unique(parts):
        here, size = parts == part, int(sizes[part])
        epochs[here] = number[here] // size
        samples[here] = offsets[part] + permute(number[here] % size, size, _key(seed, int(part) + 1), epochs[here])
    return samples, epochs


def _key(seed: int, part: int) -> int:
    return int(hash_u64(_MIXTURE, seed, part)[0])
