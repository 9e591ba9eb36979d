"""What packed data holds: coverage, edge lengths, relations, unparsed text, duplicates. One pass in bounded blocks.

A segment is a sentence, or what the cuts between sequences have left of it. N sequences of S tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from megatron_sas.data.masking import hash_u64
from megatron_sas.data.packed import SENTENCE_START, WORD_START, PackedData

BLOCK_TOKENS = 1 << 19  # tokens held in memory at a time
MIN_WORDS_OF_DUPLICATES = 5  # shorter sentences repeat in any text
_LONGEST = 1 << 16  # edge lengths are below this


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
    counts: Counter[str] = Counter()
    lengths, deprels = np.zeros(_LONGEST, np.int64), np.zeros(256, np.int64)  # edges by words between + 1; by relation
    hashes: list[tuple[np.ndarray, np.ndarray]] = []  # of sentences and of sequences
    rows = max(1, block_tokens // packed.seq_length)
    for start in range(0, packed.num_sequences, rows):
        block = _Block(packed, slice(start, start + rows))
        counts.update(block.counts())
        lengths += np.bincount(block.edge_lengths(), minlength=_LONGEST)
        deprels += np.bincount(block.deprels[block.edge], minlength=256)
        hashes.append(block.hashes())
        if after_block is not None:
            after_block(len(block.heads))
    sentences, sequences = map(np.concatenate, zip(*hashes, strict=True))
    edges, words = counts["edges"], counts["words"]
    by_length = {str(distance): int(lengths[distance]) for distance in range(1, 8)}
    by_length |= {"8-15": int(lengths[8:16].sum()), "16 and more": int(lengths[16:].sum())}
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
            "mean": float(lengths @ np.arange(_LONGEST)) / max(1, edges),
            "median": int(np.searchsorted(np.cumsum(lengths), edges / 2)),
            "counts": by_length,
        },
        "relations": {
            packed.relations[number] or "(none)": int(deprels[number])
            for number in np.argsort(-deprels[: len(packed.relations)], kind="stable")
            if deprels[number]
        },
        "duplicate_sequences": len(sequences) - len(np.unique(sequences)),
        "compared_sentences": len(sentences),
        "duplicate_sentences": len(sentences) - len(np.unique(sentences)),
    }


class _Block:
    """Some sequences (n, S) with flat views (n·S,) of their streams."""

    def __init__(self, packed: PackedData, rows: slice) -> None:
        self.tokens, self.heads = np.asarray(packed.tokens[rows]), np.asarray(packed.heads[rows], dtype=np.int64)
        boundaries, self.deprels = np.asarray(packed.boundaries[rows]).ravel(), np.asarray(packed.deprels[rows]).ravel()
        self.word, self.sentence = boundaries & WORD_START != 0, boundaries & SENTENCE_START != 0
        self.edge = self.heads.ravel() >= 0
        self._unknown = self.tokens == packed.tokenizer.unk_id
        self._special = np.isin(self.tokens, packed.tokenizer.special_ids).ravel()
        begins = self.sentence.copy()
        begins[:: packed.seq_length] = True
        self._starts = np.flatnonzero(begins)
        self._segment = np.cumsum(begins) - 1
        self._words_in = np.bincount(self._segment, self.word).astype(np.int64)

    def counts(self) -> dict[str, int]:
        unparsed = (np.bincount(self._segment, self.edge) == 0) & (self._words_in > 1)
        counts = {
            "tokens": self.tokens.size,
            "words": self.word.sum(),
            "pieces": (~self._special).sum(),
            "sentences": self.sentence.sum(),
            "unknown": self._unknown.sum(),
            "edges": self.edge.sum(),
            "edges_to_the_left": (self.heads < np.arange(self.heads.shape[1]))[self.heads >= 0].sum(),
            "unparsed_words": self._words_in[unparsed].sum(),
            "sequences_without_edges": (self.heads < 0).all(axis=1).sum(),
        }
        return {name: int(count) for name, count in counts.items()}

    def edge_lengths(self) -> np.ndarray:
        """Of every edge, in words."""
        number = np.cumsum(self.word).reshape(self.heads.shape)  # of the word that a token belongs to
        row, place = np.nonzero(self.heads >= 0)
        return np.abs(number[row, self.heads[row, place]] - number[row, place])

    def hashes(self) -> tuple[np.ndarray, np.ndarray]:
        """Of whole sentences of `MIN_WORDS_OF_DUPLICATES` words, and of sequences."""
        tokens, starts, length = self.tokens.astype(np.int64), self._starts, self.heads.shape[1]
        hashes = hash_u64(tokens.ravel(), np.arange(tokens.size) - starts[self._segment])
        hashes[self._special] = 0
        ends_row = np.append(starts[1:], tokens.size) % length == 0  # perhaps cut off
        whole = self.sentence[starts] & ~ends_row & (self._words_in >= MIN_WORDS_OF_DUPLICATES)
        return np.add.reduceat(hashes, starts)[whole], hash_u64(tokens, np.arange(length)).sum(axis=1, dtype=np.uint64)
