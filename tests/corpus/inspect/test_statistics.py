"""Statistics of packed data against counting one token at a time, with known duplicates and unparsed text."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import numpy as np
import pytest

from megatron_sas.corpus.inspect.statistics import statistics
from megatron_sas.data.packed import PackedData


@pytest.fixture
def packed(make_packed):
    """20 sequences of 64: sentences of 2 to 9 words of 1 or 2 pieces, some without edges; sequence 7 repeats 3."""
    prefix = make_packed(n=20, s=64)
    rng = np.random.default_rng(1)
    tokens = np.memmap(f"{prefix}.bin", np.uint16, "r+", shape=(20, 64))
    heads = np.memmap(f"{prefix}.heads.bin", "<i2", "r+", shape=(20, 64))
    boundaries = np.memmap(f"{prefix}.marks.bin", np.uint8, "r+", shape=(20, 64))
    deprels = np.memmap(f"{prefix}.relns.bin", np.uint8, "r+", shape=(20, 64))
    heads[:], boundaries[:], deprels[:] = -1, 0, 0
    for row in range(20):
        place = 1
        while place < 62:
            words = []
            for _ in range(rng.integers(2, 10)):
                words.append(place)
                place += rng.integers(1, 3)
            words = [word for word in words if word < 63]
            if not words:
                break
            boundaries[row, words] = 1
            boundaries[row, words[0]] = 3
            if rng.random() < 0.7:
                for word in words[1:]:
                    heads[row, word] = words[rng.integers(len(words))]
                    if heads[row, word] == word:
                        heads[row, word] = -1
                    else:
                        deprels[row, word] = rng.integers(2)
        if row % 5 == 0:
            tokens[row, 30] = 3  # a document ends here
            boundaries[row, 30] = deprels[row, 30] = 0
            heads[row, 30] = -1
            heads[row][heads[row] == 30] = -1
    for stream in (tokens, heads, boundaries, deprels):
        stream[7] = stream[3]
        stream.flush()
    return PackedData(prefix)


def naive(packed):
    """The same figures, token by token."""
    counts, lengths, relations, seen, whole = Counter(), Counter(), Counter(), Counter(), 0
    for tokens, heads, boundaries, deprels in zip(
        packed.tokens, packed.heads, packed.boundaries, packed.deprels, strict=True
    ):
        number = np.cumsum(boundaries & 1)
        cuts = [0, *(p for p in range(1, len(tokens)) if boundaries[p] & 2), len(tokens)]
        for start, stop in itertools.pairwise(cuts):
            words = sum(int(m) & 1 for m in boundaries[start:stop])
            edges = sum(h >= 0 for h in heads[start:stop])
            counts["unparsed_words"] += words if words > 1 and not edges else 0
            counts["sentences"] += int(boundaries[start] & 2 > 0)
            if boundaries[start] & 2 and stop < len(tokens) and words >= 5:
                whole += 1
                seen[tuple(int(t) if t not in packed.tokenizer.special_ids else -1 for t in tokens[start:stop])] += 1
        for place, head in enumerate(heads):
            counts["words"] += int(boundaries[place] & 1)
            counts["unknown"] += tokens[place] == 1
            if head >= 0:
                counts["edges"] += 1
                counts["left"] += head < place
                lengths[abs(int(number[head]) - int(number[place]))] += 1
                relations[packed.relations[deprels[place]] or "(none)"] += 1
    return counts, lengths, relations, whole, whole - len(seen)


@pytest.mark.parametrize("block", [1, 200, 1 << 19])
def test_against_counting(packed, block):
    done = []
    result = statistics(packed, done.append, block_tokens=block)
    counts, lengths, relations, whole, repeated = naive(packed)
    assert sum(done) == 20
    assert {name: result[name] for name in ("words", "sentences", "unknown", "edges", "unparsed_words")} == {
        name: counts[name] for name in ("words", "sentences", "unknown", "edges", "unparsed_words")
    }
    assert counts["unparsed_words"] > 50 and counts["edges"] > 200
    assert result["coverage"] == counts["edges"] / counts["words"]
    assert result["edges_to_the_left"] == counts["left"] / counts["edges"]
    by_length = result["edge_length"]["counts"]
    assert [by_length[str(d)] for d in range(1, 8)] == [lengths[d] for d in range(1, 8)]
    assert sum(by_length.values()) == counts["edges"]
    every = sorted(lengths.elements())
    assert result["edge_length"]["mean"] == pytest.approx(np.mean(every))
    assert result["edge_length"]["median"] == every[(len(every) - 1) // 2]
    assert result["relations"] == relations
    assert (result["compared_sentences"], result["duplicate_sentences"]) == (whole, repeated)
    assert result["duplicate_sequences"] == 1 and repeated > 0
    json.dumps(result)


def test_data_without_any_edge(make_packed):
    prefix = make_packed(n=3, s=16)
    np.full((3, 16), -1, "<i2").tofile(f"{prefix}.heads.bin")
    result = statistics(PackedData(prefix))
    assert result["coverage"] == 0 and result["relations"] == {} and result["edge_length"]["mean"] == 0
    assert result["sequences_without_edges"] == 3 and result["unparsed_share"] == 1
