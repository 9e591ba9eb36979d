"""What packed data holds: coverage, edge lengths, relations, unparsed text, duplicates. One pass in bounded blocks.

A segment is a sentence, or what the cuts between sequences have left of it. N sequences of S tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_sas.data.masking import hash_u64
from megatron_sas.data.packed import SENTENCE_START, WORD_START, PackedData

BLOCK_TOKENS = 1 << 19  # tokens held in memory at a time
MIN_WORDS_OF_DUPLICATES = 5  # shorter sentences repeat in any text
_LONGEST = 1 << 16  # edge lengths are below this


@dataclass
class _Totals:
    counts: dict[str, int] = field(default_factory=dict)
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(_LONGEST, dtype=np.int64))  # by words between + 1
    relations: np.ndarray = field(default_factory=lambda: np.zeros(256, dtype=np.int64))
    sentence_hashes: list[np.ndarray] = field(default_factory=list)
    sequence_hashes: list[np.ndarray] = field(default_factory=list)

    def add(self, **counts: int) -> None:
        for name, count in counts.items():
            self.counts[name] = self.counts.get(name, 0) + int(count)


def statistics(
    packed: PackedData, after_block: Callable[[int], object] | None = None, *, block_tokens: int = BLOCK_TOKENS
) -> dict[str, Any]:
    """Statistics of all sequences. Memory: 8 bytes a sentence (for duplicates) and a block.

    Args:
        after_block: called with the number of sequences done in each block.
        block_tokens: size of a block, which changes nothing in the result.

    Keys:
        `sequences`, `tokens`, `words`, `sentences` (that begin here), `unknown` ([UNK] tokens), `edges`;
        `pieces_per_word`; `coverage`, the share of words with an edge; `unparsed_words` and `unparsed_share`: words in
        segments of two or more words without any edge; `sequences_without_edges`;
        `edges_to_the_left`, the share whose head stands before its dependent; `edge_length`: mean, median and counts of
        distances in words (1 = neighbours; the last class is open); `relations`: counts by name, falling;
        `duplicate_sequences`, and `duplicate_sentences` of the `compared_sentences` (whole ones of at least
        `MIN_WORDS_OF_DUPLICATES` words): those that repeat the tokens of an earlier one.
    """
    totals = _Totals()
    rows = max(1, block_tokens // packed.seq_length)
    for start in range(0, packed.num_sequences, rows):
        stop = min(start + rows, packed.num_sequences)
        _add_block(totals, packed, slice(start, stop))
        if after_block is not None:
            after_block(stop - start)
    return _result(totals, packed)


def _add_block(totals: _Totals, packed: PackedData, rows: slice) -> None:
    tokens, heads = np.asarray(packed.tokens[rows]), np.asarray(packed.heads[rows], dtype=np.int64)
    boundaries, deprels = np.asarray(packed.boundaries[rows]).ravel(), np.asarray(packed.deprels[rows]).ravel()
    count, length = tokens.shape
    word, sentence = boundaries & WORD_START != 0, boundaries & SENTENCE_START != 0
    special = np.isin(tokens, packed.tokenizer.special_ids).ravel()

    begins = sentence.copy()
    begins[::length] = True
    starts = np.flatnonzero(begins)
    segment = np.cumsum(begins) - 1
    edge = heads.ravel() >= 0
    words_in = np.bincount(segment, word, len(starts)).astype(np.int64)
    edges_in = np.bincount(segment, edge, len(starts)).astype(np.int64)
    unparsed = (edges_in == 0) & (words_in > 1)
    totals.add(
        tokens=tokens.size,
        words=word.sum(),
        pieces=(~special).sum(),
        sentences=sentence.sum(),
        unknown=(tokens == packed.tokenizer.unk_id).sum(),
        edges=edge.sum(),
        edges_to_the_left=(heads < np.arange(length))[heads >= 0].sum(),
        unparsed_words=words_in[unparsed].sum(),
        sequences_without_edges=(~edge.reshape(count, length).any(axis=1)).sum(),
    )
    number = np.cumsum(word).reshape(count, length)  # of the word that a token belongs to
    row, place = np.nonzero(heads >= 0)
    totals.lengths += np.bincount(np.abs(number[row, heads[row, place]] - number[row, place]), minlength=_LONGEST)
    totals.relations += np.bincount(deprels[edge], minlength=256)

    position = np.arange(tokens.size) - starts[segment]
    hashes = hash_u64(tokens.ravel().astype(np.int64), position)
    hashes[special] = 0
    ends_row = np.append(starts[1:], tokens.size) % length == 0  # perhaps cut off
    whole = sentence[starts] & ~ends_row & (words_in >= MIN_WORDS_OF_DUPLICATES)
    totals.sentence_hashes.append(np.add.reduceat(hashes, starts)[whole])
    totals.sequence_hashes.append(hash_u64(tokens.astype(np.int64), np.arange(length)).sum(axis=1, dtype=np.uint64))


def _result(totals: _Totals, packed: PackedData) -> dict[str, Any]:
    counts = totals.counts
    edges, words = counts["edges"], counts["words"]
    sentences, sequences = np.concatenate(totals.sentence_hashes), np.concatenate(totals.sequence_hashes)
    by_length = {str(distance): int(totals.lengths[distance]) for distance in range(1, 8)}
    by_length |= {"8-15": int(totals.lengths[8:16].sum()), "16 and more": int(totals.lengths[16:].sum())}
    distances = np.arange(_LONGEST)
    order = sorted(range(len(packed.relations)), key=lambda number: (-totals.relations[number], number))
    return {
        "sequences": packed.num_sequences,
        **{name: counts[name] for name in ("tokens", "words", "sentences", "unknown", "edges")},
        "pieces_per_word": counts["pieces"] / max(1, words),
        "coverage": edges / max(1, words),
        "unparsed_words": counts["unparsed_words"],
        "unparsed_share": counts["unparsed_words"] / max(1, words),
        "sequences_without_edges": counts["sequences_without_edges"],
        "edges_to_the_left": counts["edges_to_the_left"] / max(1, edges),
        "edge_length": {
            "mean": float(totals.lengths @ distances) / max(1, edges),
            "median": int(np.searchsorted(np.cumsum(totals.lengths), edges / 2)),
            "counts": by_length,
        },
        "relations": {
            packed.relations[number] or "(none)": int(totals.relations[number])
            for number in order
            if totals.relations[number]
        },
        "duplicate_sequences": len(sequences) - len(np.unique(sequences)),
        "compared_sentences": len(sentences),
        "duplicate_sentences": len(sentences) - len(np.unique(sentences)),
    }
