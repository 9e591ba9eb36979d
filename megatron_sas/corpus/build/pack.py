"""Documents → always-full sequences `[CLS] … [SEP]`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass
class PackingCounts:
    """What packing did: `edges` written, `edges_cut` dropped because they cross a sequence's end, and the rest."""

    sequences: int = 0
    documents: int = 0
    empty_documents: int = 0
    pieces: int = 0
    edges: int = 0
    edges_cut: int = 0
    joints_without_separator: int = 0
    tail_pieces: int = 0
    tail_edges: int = 0


# tokens int32, heads int16, boundaries uint8, relations uint8, each (S,); the arrays are reused after the call
Emit = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], None]


class Packer:
    """Fill sequences of S tokens with the pieces of documents, one after another, and pass each to `emit`.

    [SEP] stands between documents, except where the end of a sequence already separates them: none follows [CLS] and
    none comes directly before the final [SEP]. (When a document ends one place before the end, the first piece of the
    next fills that place: counted as `joints_without_separator`.) Sentences are cut where a sequence is full, and edges
    that cross the cut are dropped and counted. Tokens after the last full sequence are dropped and counted.
    """

    def __init__(self, seq_length: int, cls_id: int, sep_id: int, emit: Emit) -> None:
        if not 4 <= seq_length <= 1 << 15:
            raise ValueError(f"seq_length {seq_length} is not in [4, 32768]")
        self.counts = PackingCounts()
        self._emit, self._sep_id = emit, sep_id
        self._end = seq_length - 1  # the place of the final [SEP]
        self._places = np.arange(seq_length)
        self._tokens = np.zeros(seq_length, dtype=np.int32)
        self._offsets = np.zeros(seq_length, dtype=np.int32)
        self._boundaries = np.zeros(seq_length, dtype=np.uint8)
        self._relations = np.zeros(seq_length, dtype=np.uint8)
        self._tokens[0], self._tokens[-1] = cls_id, sep_id
        self._next = 1
        self._document_tokens: int | None = None  # None before the first document
        self._tail_tokens = 0  # pieces, not separators, in the sequence being filled

    def start_document(self) -> None:
        """What is added next belongs to a new document."""
        self._close_document()
        self.counts.documents += 1
        self._document_tokens = 0

    def add(self, tokens: np.ndarray, offsets: np.ndarray, boundaries: np.ndarray, relations: np.ndarray) -> None:
        """Append pieces (P,) to the current document; `offsets` as in `Alignment`, edges within this call only."""
        if not len(tokens):
            return
        if not self._document_tokens:
            self._separate()
        self._document_tokens = (self._document_tokens or 0) + len(tokens)
        self.counts.pieces += len(tokens)
        done = 0
        while done < len(tokens):
            size = min(len(tokens) - done, self._end - self._next)
            here, there = slice(self._next, self._next + size), slice(done, done + size)
            self._tokens[here], self._offsets[here] = tokens[there], offsets[there]
            self._boundaries[here], self._relations[here] = boundaries[there], relations[there]
            self._next += size
            self._tail_tokens += size
            done += size
            if self._next == self._end:
                self._flush()

    def finish(self) -> None:
        """Drop and count what does not fill a sequence."""
        self._close_document()
        self.counts.tail_pieces = self._tail_tokens
        self.counts.tail_edges = int(np.count_nonzero(self._offsets[1 : self._next]))

    def _close_document(self) -> None:
        if self._document_tokens == 0:
            self.counts.empty_documents += 1

    def _separate(self) -> None:
        if self._next == 1:
            return
        if self._next == self._end - 1:
            self.counts.joints_without_separator += 1
            return
        for stream, value in (
            (self._tokens, self._sep_id),
            (self._offsets, 0),
            (self._boundaries, 0),
            (self._relations, 0),
        ):
            stream[self._next] = value
        self._next += 1

    def _flush(self) -> None:
        edge = self._offsets != 0
        target = self._places + self._offsets
        kept = edge & (target >= 1) & (target < self._end)
        self.counts.edges += int(np.count_nonzero(kept))
        self.counts.edges_cut += int(np.count_nonzero(edge & ~kept))
        heads = np.where(kept, target, -1).astype(np.int16)
        self._emit(self._tokens, heads, self._boundaries, self._relations)
        self.counts.sequences += 1
        self._next, self._tail_tokens = 1, 0
