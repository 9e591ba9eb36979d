"""Heads that are not syntax: controls for the SAS regularizer, with as many edges in each sentence.

All are pure functions of (heads, boundaries, seed, sample): a row of the result depends on its own row and sample
number only. Words before the first sentence start of a sequence are the rest of a sentence that was cut. A sentence
without edges, i.e. without a parse, stays without.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from megatron_sas.core.cli import InputError
from megatron_sas.data.masking import hash_u64
from megatron_sas.data.packed import SENTENCE_START, WORD_START

_CONTROL = 0x6374726C  # keeps these bits apart from every other use of the same seed
_PERMUTED, _RANDOM_TREE = 1, 2
# Proposed exchanges in a sentence of n words: 100 + 20 n, enough for a tiny sentence to forget its own tree. On EWT
# 22.5 % of the edges are then still those of the parse, with twice as many 22.3 %: these agree by chance, most lengths
# being ±1.
PROPOSALS, PROPOSALS_PER_WORD = 100, 20

Control = Callable[[np.ndarray, np.ndarray, int, np.ndarray], np.ndarray]


class _Words(NamedTuple):
    """The W words of a block of sequences, in order."""

    position: np.ndarray  # (W,) flat position in the block
    sentence: np.ndarray  # (W,) sentence number
    starts: np.ndarray  # (sentences,) first word
    sizes: np.ndarray  # (sentences,) number of words
    head: np.ndarray  # (W,) word number of the head or -1


def permuted(heads: np.ndarray, boundaries: np.ndarray, seed: int, samples: np.ndarray) -> np.ndarray:
    """Each sentence's tree over a random permutation π of its words: the edge i→h becomes π(i)→π(h).

    Args:
        heads: (N, S) integers, as in PREFIX.heads.bin. boundaries: (N, S) uint8. seed: any integer.
        samples: (N,) integers, the number of each sequence in the whole data.

    Returns:
        (N, S) int16.

    Raises:
        ValueError: a head is not the start of a word in the same sentence.
    """
    words = _words(heads, boundaries)
    bits = _word_bits(words, heads.shape, _PERMUTED, seed, samples)
    image = np.lexsort((bits, words.sentence))
    result = np.full(len(words.head), -1)
    edges = np.flatnonzero(words.head >= 0)
    result[image[edges]] = image[words.head[edges]]
    return _to_heads(words, result, heads.shape)


def offset(heads: np.ndarray, boundaries: np.ndarray, distance: int) -> np.ndarray:
    """Every word that had a head depends on the word `distance` words away (negative: before).

    Where that is outside of the sentence, on the word as far away on the other side, so that as much is regularized as
    with syntax; only words in the middle of a sentence of up to 2·|distance| - 1 words have neither, and get -1.

    Args, result and errors as in `permuted`; nothing is random.
    """
    words = _words(heads, boundaries)
    head, start = np.full(len(words.head), -1), words.starts[words.sentence]
    for target in (np.arange(len(head)) - distance, np.arange(len(head)) + distance):  # the second overrides
        inside = (target >= start) & (target < start + words.sizes[words.sentence]) & (words.head >= 0)
        head = np.where(inside, target, head)
    return _to_heads(words, head, heads.shape)


def random_tree(heads: np.ndarray, boundaries: np.ndarray, seed: int, samples: np.ndarray) -> np.ndarray:
    """Random trees with exactly the signed edge lengths of each sentence's own tree, in words.

    A random walk over trees: `PROPOSALS` + `PROPOSALS_PER_WORD` × words times, two words of the sentence exchange the
    lengths of their edges (a headless word passes its headlessness on), unless an edge would leave the sentence or
    close a cycle. Proposals are symmetric, so the walk tends to the uniform distribution over the trees it can reach.
    Every sentence keeps its number of edges, its multiset of lengths and its acyclicity; short sentences may have no
    other such tree and then keep the one they have.

    Args, result and errors as in `permuted`; also ValueError when a head chain is a cycle.
    """
    words = _words(heads, boundaries)
    # Proposals of a sentence are drawn from the bits of its first word.
    bits = _word_bits(words, heads.shape, _RANDOM_TREE, seed, samples)[words.starts]
    head = words.head.copy()
    edges = np.bincount(words.sentence, weights=head >= 0, minlength=len(words.sizes))
    active = np.flatnonzero((words.sizes > 1) & (edges > 0))
    longest = int(words.sizes.max(initial=0))
    step = 0
    while len(active):
        size, first = words.sizes[active].astype(np.uint64), words.starts[active]
        draw = hash_u64(bits[active], step)
        a = first + ((draw >> np.uint64(32)) * size >> np.uint64(32)).astype(np.int64)
        b = first + ((draw & np.uint64(0xFFFFFFFF)) * size >> np.uint64(32)).astype(np.int64)
        _exchange(head, a, b, first, first + words.sizes[active], longest)
        step += 1
        active = active[PROPOSALS + PROPOSALS_PER_WORD * words.sizes[active] > step]
    return _to_heads(words, head, heads.shape)


def parse_control(kind: str) -> Control:
    """The control named `permuted`, `random_tree` or `offset:K` as a function of (heads, boundaries, seed, samples).

    Raises:
        InputError: the name is none of these, or K is not an integer other than 0.
    """
    if kind == "permuted":
        return permuted
    if kind == "random_tree":
        return random_tree
    if re.fullmatch(r"offset:[+-]?\d{1,4}", kind) and int(kind.partition(":")[2]) != 0:
        distance = int(kind.partition(":")[2])
        return lambda heads, boundaries, seed, samples: offset(heads, boundaries, distance)
    raise InputError(
        f"control {kind!r}: use permuted, random_tree or offset:K with an integer K other than 0, as in offset:-2"
    )


def _words(heads: np.ndarray, boundaries: np.ndarray) -> _Words:
    """Words, sentences and word-level heads of a block; ValueError for a head that leads out of its sentence."""
    n, seq = heads.shape
    is_word = (boundaries & WORD_START).astype(bool)
    position = np.flatnonzero(is_word)
    row = position // seq
    opens = (boundaries.ravel()[position] & SENTENCE_START).astype(bool)
    opens |= np.diff(row, prepend=-1) != 0
    sentence = np.cumsum(opens) - 1
    starts = np.flatnonzero(opens)
    sizes = np.diff(starts, append=len(position))
    heads = heads.astype(np.int64)
    _check_none((heads >= 0) & ~is_word, "a token that starts no word has a head")
    _check_none((heads < -1) | (heads >= seq), "a head is outside the sequence")
    number = np.full(n * seq, -1)
    number[position] = np.arange(len(position))
    target = heads.ravel()[position]
    head = np.where(target >= 0, number[row * seq + np.maximum(target, 0)], -1)
    wrong = np.zeros(n * seq, dtype=bool)
    wrong[position] = (target >= 0) & ((head < 0) | (sentence[head] != sentence))
    _check_none(wrong.reshape(n, seq), "a head is not the start of a word in the same sentence")
    return _Words(position, sentence, starts, sizes, head)


def _check_none(wrong: np.ndarray, fault: str) -> None:
    """Raise `ValueError` with the first sequence in which a token (N, S) is wrong."""
    if wrong.any():
        raise ValueError(f"sequence {np.argwhere(wrong)[0, 0]}: {fault}")


def _word_bits(words: _Words, shape: tuple[int, int], use: int, seed: int, samples: np.ndarray) -> np.ndarray:
    """(W,) uint64: 64 bits for each word, by its position in its sequence."""
    row, column = np.divmod(words.position, shape[1])
    return hash_u64(_CONTROL, use, seed, np.asarray(samples)[row], column)


def _to_heads(words: _Words, head: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Word-level heads as (N, S) int16 positions within the sequence."""
    result = np.full(shape[0] * shape[1], -1, dtype=np.int16)
    edges = np.flatnonzero(head >= 0)
    result[words.position[edges]] = words.position[head[edges]] % shape[1]
    return result.reshape(shape)


def _exchange(head: np.ndarray, a: np.ndarray, b: np.ndarray, low: np.ndarray, high: np.ndarray, longest: int) -> None:
    """Exchange the edge lengths of words a[k] and b[k], in place, where the result stays in [low, high) and acyclic.

    All arrays but `head` have one entry per sentence, so that no two exchanges touch the same words.
    """
    old_a, old_b = head[a], head[b]
    new_a = np.where(old_b >= 0, old_b - b + a, -1)
    new_b = np.where(old_a >= 0, old_a - a + b, -1)
    fits = (new_a != old_a) | (new_b != old_b)
    for new, old in ((new_a, old_b), (new_b, old_a)):
        fits &= (old < 0) | ((new >= low) & (new < high))
    a, b, old_a, old_b = a[fits], b[fits], old_a[fits], old_b[fits]
    head[a], head[b] = new_a[fits], new_b[fits]
    # Every other edge is as before, so a cycle would lead from a to a, from b to b, or from a to b and back.
    from_a, from_b = _walk(head, a, b, longest), _walk(head, b, a, longest)
    cycle = (from_a == a) | (from_b == b) | ((from_a == b) & (from_b == a))
    head[a[cycle]], head[b[cycle]] = old_a[cycle], old_b[cycle]


def _walk(head: np.ndarray, start: np.ndarray, other: np.ndarray, longest: int) -> np.ndarray:
    """Follow heads from `start` to the first of: `start` again, `other`, or the end (-1). ValueError after `longest`
    steps."""
    reached = head[start]
    going = np.flatnonzero((reached >= 0) & (reached != start) & (reached != other))
    for _ in range(longest):
        if not len(going):
            return reached
        now = head[reached[going]]
        reached[going] = now
        going = going[(now >= 0) & (now != start[going]) & (now != other[going])]
    raise ValueError("the heads of a sentence form a cycle")
