"""Controls against definitions written out word by word."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sas.core.cli import InputError
from megatron_sas.corpus.controls import offset, parse_control, permuted, random_tree

KINDS = ("permuted", "random_tree", "offset:1", "offset:-2")


def make_block(seed: int, n: int, seq: int, parsed_share: float = 0.8) -> tuple[np.ndarray, np.ndarray]:
    """Random sequences: sentences of 1 to 12 words of 1 to 3 pieces, random trees, some sentences without a parse."""
    rng = np.random.default_rng(seed)
    heads = np.full((n, seq), -1, dtype=np.int16)
    boundaries = np.zeros((n, seq), dtype=np.uint8)
    for row in range(n):
        position = 1
        first = rng.random() < 0.5  # the sequence may begin in the middle of a sentence
        while position < seq - 1:
            starts = []
            for _ in range(rng.integers(1, 13)):
                if position >= seq - 1:
                    break
                boundaries[row, position] = 1 if starts or first else 3
                first = first and not starts
                starts.append(position)
                position += rng.integers(1, 4)
            first = False
            if rng.random() < parsed_share:
                order = rng.permutation(len(starts))  # each word's head comes earlier in this order: a tree
                for rank in range(1, len(order)):
                    if rng.random() < 0.95:
                        heads[row, starts[order[rank]]] = starts[order[rng.integers(rank)]]
            position += rng.random() < 0.1  # a [SEP]
    return heads, boundaries


def sentences_of(boundaries: np.ndarray) -> list[list[int]]:
    """Word positions of each sentence of one sequence."""
    result: list[list[int]] = []
    for position, mark in enumerate(boundaries):
        if mark & 1:
            if mark & 2 or not result:
                result.append([])
            result[-1].append(position)
    return result


def edges_of(heads: np.ndarray, sentence: list[int]) -> list[tuple[int, int]]:
    """(dependent, head) in words of the sentence; fails if a head is not a word of the sentence."""
    return [(i, sentence.index(heads[p])) for i, p in enumerate(sentence) if heads[p] >= 0]


def is_acyclic(edges: list[tuple[int, int]]) -> bool:
    head = dict(edges)
    for word in head:
        for _ in range(len(head) + 1):
            if word not in head:
                break
            word = head[word]
        else:
            return False
    return True


def degree_sequence(edges: list[tuple[int, int]]) -> list[int]:
    return sorted(Counter(h for _, h in edges).values())


blocks = st.builds(make_block, st.integers(0, 10**6), st.integers(1, 4), st.sampled_from([3, 8, 40, 64]))


@settings(max_examples=40, deadline=None)
@given(blocks, st.integers(0, 2**40))
def test_what_each_control_keeps(block, seed):
    heads, boundaries = block
    samples = np.arange(len(heads)) + 7
    results = {kind: parse_control(kind)(heads, boundaries, seed, samples) for kind in KINDS}
    for kind, result in results.items():
        assert result.dtype == np.int16 and result.shape == heads.shape
        assert np.all(result[(boundaries & 1) == 0] == -1), kind
    for row in range(len(heads)):
        for sentence in sentences_of(boundaries[row]):
            before = edges_of(heads[row], sentence)
            shuffled = edges_of(results["permuted"][row], sentence)
            assert len(shuffled) == len(before) and is_acyclic(shuffled)
            assert degree_sequence(shuffled) == degree_sequence(before)
            tree = edges_of(results["random_tree"][row], sentence)
            assert is_acyclic(tree)
            assert Counter(h - i for i, h in tree) == Counter(h - i for i, h in before)
            for kind in ("offset:1", "offset:-2"):
                distance = int(kind.split(":")[1])
                inside = range(len(sentence))
                targets = [(i, [t for t in (i + distance, i - distance) if t in inside]) for i, _ in before]
                expected = [(i, near[0]) for i, near in targets if near]
                assert edges_of(results[kind][row], sentence) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_pure_functions_of_seed_and_sample(kind):
    heads, boundaries = make_block(3, 12, 64)
    control = parse_control(kind)
    whole = control(heads, boundaries, 5, np.arange(12))
    again = np.concatenate([control(heads[i : i + 1], boundaries[i : i + 1], 5, np.array([i])) for i in range(12)])
    np.testing.assert_array_equal(whole, again)
    if not kind.startswith("offset"):
        assert np.any(whole != control(heads, boundaries, 6, np.arange(12)))
        assert np.any(whole != control(heads, boundaries, 5, np.arange(12) + 1))


def one_sentence(tree: list[int], copies: int) -> tuple[np.ndarray, np.ndarray]:
    """`copies` sequences that hold the same sentence, given by 0-based heads (-1: root)."""
    heads = np.array([[h + 1 if h >= 0 else -1 for h in [-2, *tree, -2]]] * copies, dtype=np.int16)
    heads[:, [0, -1]] = -1
    boundaries = np.array([[0, 3, *[1] * (len(tree) - 1), 0]] * copies, dtype=np.uint8)
    return heads, boundaries


def test_permutations_are_uniform():
    heads, boundaries = one_sentence([1, 2, -1], 6000)  # a chain: its six images differ
    found = Counter(map(tuple, permuted(heads, boundaries, 1, np.arange(6000)).tolist()))
    assert len(found) == 6
    assert all(abs(count - 1000) < 150 for count in found.values())  # 5 standard deviations


def test_random_trees_are_uniform_over_the_trees_with_the_same_lengths():
    lengths = [1, 2, None, -1, -2]  # signed edge lengths of the sentence below
    tree = [-1 if d is None else i + d for i, d in enumerate(lengths)]
    heads, boundaries = one_sentence(tree, 8000)
    found = Counter(map(tuple, random_tree(heads, boundaries, 1, np.arange(8000))[:, 1:-1].tolist()))
    # Independent enumeration: all assignments of the lengths to words.
    allowed = set()
    for choice in set(permutations(lengths)):
        edges = [(i, i + d) for i, d in enumerate(choice) if d is not None]
        if all(0 <= h < 5 for _, h in edges) and is_acyclic(edges):
            allowed.add(tuple(-1 if d is None else i + d + 1 for i, d in enumerate(choice)))
    assert set(found) == allowed
    expected = 8000 / len(allowed)
    assert all(abs(count - expected) < 6 * expected**0.5 for count in found.values())


def test_controls_differ_from_the_parse():
    heads, boundaries = make_block(0, 50, 64, parsed_share=1.0)
    edges = heads >= 0
    # Sentences of at most 12 words: a random tree with the same lengths repeats many edges by chance.
    for control, limit in ((permuted, 0.35), (random_tree, 0.5)):
        equal = np.mean(control(heads, boundaries, 0, np.arange(50))[edges] == heads[edges])
        assert equal < limit, control.__name__


def test_unparsed_and_wordless_sequences():
    heads = np.full((2, 6), -1, dtype=np.int16)
    boundaries = np.array([[0, 3, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0]], dtype=np.uint8)
    for kind in KINDS:
        assert np.all(parse_control(kind)(heads, boundaries, 0, np.arange(2)) == -1)


@pytest.mark.parametrize(
    "wrong", [{1: 3}, {1: 4}, {3: 1}, {1: 6}, {1: -5}], ids=["piece", "sentence", "from piece", "outside", "negative"]
)
def test_inconsistent_heads_are_refused(wrong):
    heads = np.full((1, 6), -1, dtype=np.int16)
    for position, head in wrong.items():
        heads[0, position] = head
    boundaries = np.array([[0, 3, 1, 0, 3, 0]], dtype=np.uint8)
    for control in (lambda h, m: permuted(h, m, 0, np.arange(1)), lambda h, m: offset(h, m, 1)):
        with pytest.raises(ValueError, match="sequence 0"):
            control(heads, boundaries)


def test_a_cycle_is_refused():
    heads, boundaries = one_sentence([1, 0, 3, -1, 3, 4, 5, 6], 1)
    with pytest.raises(ValueError, match="cycle"):
        random_tree(heads, boundaries, 0, np.arange(1))


@pytest.mark.parametrize("kind", ["", "syntax", "offset", "offset:", "offset:0", "offset:-0", "offset:1.5", "Permuted"])
def test_unknown_controls(kind):
    with pytest.raises(InputError, match="random_tree"):
        parse_control(kind)
