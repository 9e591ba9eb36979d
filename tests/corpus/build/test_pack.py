"""Packing against a naive reference that works on lists."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sas.corpus.build.pack import Packer

CLS, SEP = 2, 3


def pack(documents, seq_length):
    """`documents`: lists of calls, each (tokens, offsets)."""
    out = []
    packer = Packer(seq_length, CLS, SEP, lambda *streams: out.append([stream.copy() for stream in streams]))
    for document in documents:
        packer.start_document()
        for tokens, offsets in document:
            tokens = np.array(tokens, dtype=np.int32)
            boundaries = (tokens % 4).astype(np.uint8)
            relations = (tokens % 7).astype(np.uint8)
            packer.add(tokens, np.array(offsets, dtype=np.int32), boundaries, relations)
    packer.finish()
    return out, packer.counts


def naive(documents, seq_length):
    """Sequences as lists of (token, head), one piece at a time."""
    room = seq_length - 2
    sequences, current, joints = [], [], 0
    cut = 0
    place = {}  # (document, piece) → (sequence, position)
    heads = {}
    for d, document in enumerate(documents):
        number = 0
        for tokens, offsets in document:
            for token, offset in zip(tokens, offsets, strict=True):
                if number == 0 and current:
                    if len(current) == room - 1:
                        joints += 1
                    else:
                        current.append(SEP)
                place[d, number] = (len(sequences), len(current) + 1)
                if offset:
                    heads[d, number] = (d, number + offset)
                current.append(token)
                number += 1
                if len(current) == room:
                    sequences.append([CLS, *current, SEP])
                    current = []
    table = [[-1] * seq_length for _ in sequences]
    tail = 0
    for dependent, head in heads.items():
        sequence, position = place[dependent]
        if sequence == len(sequences):
            tail += 1
        elif place[head][0] == sequence:
            table[sequence][position] = place[head][1]
        else:
            cut += 1
    return sequences, table, cut, tail, joints, sum(token >= 10 for token in current)


@st.composite
def documents(draw):
    result = []
    for _ in range(draw(st.integers(0, 8))):
        document = []
        for _ in range(draw(st.integers(0, 3))):
            size = draw(st.integers(0, 12))
            tokens = draw(st.lists(st.integers(10, 99), min_size=size, max_size=size))
            heads = [draw(st.integers(0, size - 1)) for _ in range(size)]
            document.append((tokens, [head - index for index, head in enumerate(heads)]))
        result.append(document)
    return result


@settings(max_examples=300, deadline=None)
@given(documents(), st.integers(4, 14))
def test_against_the_naive_reference(texts, seq_length):
    out, counts = pack(texts, seq_length)
    sequences, heads, cut, tail_edges, joints, tail = naive(texts, seq_length)
    assert [row[0].tolist() for row in out] == sequences
    assert [row[1].tolist() for row in out] == heads
    for tokens, _, boundaries, relations in out:
        content = tokens >= 10
        np.testing.assert_array_equal(boundaries, np.where(content, tokens % 4, 0))
        np.testing.assert_array_equal(relations, np.where(content, tokens % 7, 0))
        assert len(tokens) == seq_length and tokens[0] == CLS and tokens[-1] == SEP
        assert tokens[1] != SEP
        assert not ((tokens[1:] == SEP) & (tokens[:-1] == SEP)).any()
    assert counts["sequences"] == len(sequences) and counts["edges_cut"] == cut and counts["tail_edges"] == tail_edges
    assert counts["joints_without_separator"] == joints and counts["tail_pieces"] == tail
    assert counts["documents"] == len(texts)
    sizes = [sum(len(tokens) for tokens, _ in text) for text in texts]
    assert counts["empty_documents"] == sizes.count(0) and counts["pieces"] == sum(sizes)
    edges = sum(offset != 0 for text in texts for _, offsets in text for offset in offsets)
    assert counts["edges"] + counts["edges_cut"] + counts["tail_edges"] == edges


def test_by_hand():
    out, _ = pack([[([10, 11], [1, 0])], [], [([12], [0])], [([13, 14, 15], [2, 0, -1])]], 8)
    assert [row[0].tolist() for row in out] == [[2, 10, 11, 3, 12, 3, 13, 3]]
    assert out[0][1].tolist() == [-1, 2, -1, -1, -1, -1, -1, -1]


def test_sequence_length_limits():
    for bad in (3, 32_769):
        with pytest.raises(ValueError):
            Packer(bad, CLS, SEP, lambda *_: None)
    size = 32_768
    out, _ = pack([[([10] * (size - 2), [size - 3] + [0] * (size - 3))]], size)
    assert out[0][1][1] == size - 2 and out[0][1].dtype == np.int16
