"""Documents → always-full sequences `[CLS] … [SEP]`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np

# tokens int32, heads int16, boundaries uint8, relations uint8, each (S,); the arrays are reused after the call
Emit = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], None]


class Packer:
    """Fill sequences of S tokens with the tokens of documents, one after another, and pass each to `emit`.

    [SEP] stands between documents, except where the end of a sequence already separates them: none follows [CLS] and
    none comes directly before the final [SEP]. (When a document ends one place before the end, the first token of the
    next fills that place: counted as `joints_without_separator`.) Sentences are cut where a sequence is full, and edges
    that cross the cut are dropped and counted. Tokens after the last full sequence are dropped and counted.

    `counts`: `sequences`, `documents`, `empty_documents`, `pieces` (tokens but for special ones), `edges` written,
    `edges_cut` dropped because they cross a sequence's end, `joints_without_separator`, `tail_pieces`, `tail_edges`.
    """

    def __init__(self, seq_length: int, cls_id: int, sep_id: int, emit: Emit) -> None:
        if not 4 <= seq_length <= 1 << 15:
            raise ValueError(f"seq_length {seq_length} is not in [4, 32768]")
        self.counts: Counter[str] = Counter()
        self._emit, self._sep_id = emit, sep_id
        self._end = seq_length - 1  # the place of the final [SEP]
        self._places = np.arange(seq_length)
        # tokens, offsets, boundaries, relations
        self._streams = [np.zeros(seq_length, dtype) for dtype in (np.int32, np.int32, np.uint8, np.uint8)]
        self._streams[0][[0, -1]] = cls_id, sep_id
        self._next = 1
        self._document_tokens: int | None = None  # None before the first document
        self._tail_tokens = 0  # in the sequence being filled, without separators

    def start_document(self) -> None:
        """What is added next belongs to a new document."""
        self._close_document()
        self.counts["documents"] += 1
        self._document_tokens = 0

    def add(self, tokens: np.ndarray, offsets: np.ndarray, boundaries: np.ndarray, relations: np.ndarray) -> None:
        """Append tokens (P,) to the current document; `offsets` as in `Alignment`, edges within this call only."""
        if not len(tokens):
            return
        if not self._document_tokens:
            self._separate()
        self._document_tokens = (self._document_tokens or 0) + len(tokens)
        self.counts["pieces"] += len(tokens)
        done = 0
        while done < len(tokens):
            size = min(len(tokens) - done, self._end - self._next)
            for stream, values in zip(self._streams, (tokens, offsets, boundaries, relations), strict=True):
                stream[self._next : self._next + size] = values[done : done + size]
            self._next += size
            self._tail_tokens += size
            done += size
            if self._next == self._end:
                self._flush()

    def finish(self) -> None:
        """Drop and count what does not fill a sequence."""
        self._close_document()
        self.counts["tail_pieces"] = self._tail_tokens
        self.counts["tail_edges"] = int(np.count_nonzero(self._streams[1][1 : self._next]))

    def _close_document(self) -> None:
        self.counts["empty_documents"] += self._document_tokens == 0

    def _separate(self) -> None:
        if self._next == 1:
            return
        if self._next == self._end - 1:
            self.counts["joints_without_separator"] += 1
            return
        for stream, value in zip(self._streams, (self._sep_id, 0, 0, 0), strict=True):
            stream[self._next] = value
        self._next += 1

    def _flush(self) -> None:
        tokens, offsets, boundaries, relations = self._streams
        edge = offsets != 0
        target = self._places + offsets
        kept = edge & (target >= 1) & (target < self._end)
        self.counts["edges"] += int(np.count_nonzero(kept))
        self.counts["edges_cut"] += int(np.count_nonzero(edge & ~kept))
        self._emit(tokens, np.where(kept, target, -1).astype(np.int16), boundaries, relations)
        self.counts["sequences"] += 1
        self._next, self._tail_tokens = 1, 0
