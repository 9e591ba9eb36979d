"""A tokenised Hugging Face dataset with dependency heads, as the paper published it → packed data.

Columns: `input_ids`, `heads` (position of the head's first piece in the same row) and `relns` (number or name of the
relation); -1 is none. Rows `[CLS] … [SEP]` of exactly the sequence length are taken as they are; the pieces of all
others (shorter, longer, padded) are packed anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sas.core.cli import InputError, progress
from megatron_sas.corpus.build.pack import Packer
from megatron_sas.corpus.build.packed_writer import PackedWriter, check_seq_length, relation_number
from megatron_sas.corpus.parsers.base import RelationNames
from megatron_sas.corpus.readers.hub import read_rows
from megatron_sas.corpus.readers.registry import input_files, source_name
from megatron_sas.corpus.readers.text_lines import check_file_name
from megatron_sas.data.packed import SENTENCE_START, WORD_START
from megatron_sas.data.tokenizer import load_tokenizer, tokenizer_info
from megatron_sas.data.unknown import Unknown

COLUMNS = ("input_ids", "heads", "relns")


@dataclass
class ImportSettings:
    """What `tools/import_dataset.py` takes; its --help explains each."""

    input: str
    tokenizer: str
    output: str
    seq_length: int = 512
    relations: str | None = None
    overwrite: bool = False


@dataclass
class _Row:
    """Streams of a row (P,): `heads` are positions in the row or -1, `relations` common numbers, 0 for none."""

    tokens: np.ndarray
    heads: np.ndarray
    boundaries: np.ndarray
    relations: np.ndarray


def import_dataset(settings: ImportSettings) -> dict[str, Any]:
    """Write packed data and return its header, whose `counts` say what could be used and what was left out.

    Word starts are pieces with a head, a relation or a dependent; in text without a parse (between two special tokens),
    pieces that continue no word by the tokenizer's own marking. A sentence starts at a word start that no edge spans.

    Raises:
        InputError: columns missing, no row that can be used, too many relations.
    """
    check_seq_length(settings.seq_length)
    check_file_name(settings.input)
    tokenizer = load_tokenizer(settings.tokenizer)
    info = tokenizer_info(tokenizer, settings.tokenizer)
    reader = _Reader(info.vocab_size, info.special_ids, _continuations(tokenizer, info.vocab_size), settings.relations)
    counts: Counter[str] = Counter()
    with PackedWriter(settings.output, settings.seq_length, info, settings.overwrite) as writer:
        packer = Packer(settings.seq_length, info.cls_id, info.sep_id, writer.add)
        for tokens, heads, relations in _rows(settings.input, counts):
            row = reader(tokens, heads, relations, counts)
            if row is None:
                continue
            unknown = Unknown.of(row.tokens, info.unk_id, info.special_ids)
            counts.update(pieces=unknown.tokens, pieces_unknown=unknown.unknown)
            inner = slice(1, -1)
            if (
                len(row.tokens) == settings.seq_length
                and (row.tokens[0], row.tokens[-1]) == (info.cls_id, info.sep_id)
                and not np.isin(row.tokens[inner], (info.pad_id, info.cls_id)).any()
            ):
                writer.add(row.tokens, row.heads, row.boundaries, row.relations)
                counts["rows_as_they_are"] += 1
                counts["edges"] += int((row.heads >= 0).sum())
            else:
                counts["edges_across_separators"] += _pack(packer, row, info.special_ids)
                counts["rows_packed_anew"] += 1
        packer.finish()
        if not writer.num_sequences:
            raise InputError(f"{settings.input}: {_summary(counts)}; nothing fills a sequence of {settings.seq_length}")
        packed = asdict(packer.counts)
        counts["edges"] += packed["edges"]
        counts.update({name: packed[name] for name in ("edges_cut", "tail_pieces", "tail_edges")})
        counts["sequences"] = writer.num_sequences
        return writer.finish(
            reader.names.names,
            parser={"name": "imported"},
            inputs=[source_name(settings.input)],
            input_files=input_files([settings.input]),
            counts={name: counts[name] for name in COUNTS},
            report=reader.report(),
        )


COUNTS = {
    "rows": "rows of the dataset",
    "rows_as_they_are": "rows that are whole sequences",
    "rows_packed_anew": "rows of another length or with padding: their pieces are packed anew",
    "rows_left_out": "rows whose columns differ in length, are empty, or hold ids that are not in the vocabulary",
    "rows_without_edges": "rows without any edge (text that was not parsed)",
    "pieces": "pieces in the rows used, special tokens aside",
    "pieces_unknown": "[UNK] among them",
    "sequences": "sequences written",
    "edges": "edges written",
    "edges_to_self": "heads that point to their own position (roots): no edges",
    "edges_outside": "heads outside the row: no edges",
    "edges_of_specials": "heads of or at special tokens and padding: no edges",
    "edges_to_last_token": "heads that point to the last place of a row, where code that clamps positions puts many",
    "relations_negative": "relations below -1: no relations",
    "edges_across_separators": "edges between two runs of pieces that a special token separates, in rows packed anew",
    "edges_cut": "edges that packing anew has cut at a sequence's end",
    "tail_pieces": "pieces after the last full sequence",
    "tail_edges": "edges among them",
}


def _summary(counts: Counter[str]) -> str:
    return f"{counts['rows']} rows, {counts['rows_left_out']} of them left out"


def _continuations(tokenizer: Any, vocab_size: int) -> np.ndarray:
    """(V,) bool: pieces that continue a word. By "##" if the model marks them so, else by the lack of "▁" or "Ġ"."""
    prefix = getattr(tokenizer.backend_tokenizer.model, "continuing_subword_prefix", None)
    result = np.zeros(vocab_size, dtype=bool)
    for piece, number in tokenizer.get_vocab().items():
        result[number] = piece.startswith(prefix) if prefix else not piece.startswith(("▁", "Ġ"))
    return result


def _rows(name: str, counts: Counter[str]) -> Iterator[tuple[Any, Any, Any]]:
    for row in progress(read_rows(name), unit=" rows", unit_scale=True, desc="importing"):
        missing = [column for column in COLUMNS if column not in row]
        if missing and not counts["rows"]:  # a later row of JSON lines may lack one, and is then left out
            raise InputError(
                f"{name}: has no column {', '.join(missing)}; needed are {', '.join(COLUMNS)}, there are "
                f"{', '.join(row)}"
            )
        counts["rows"] += 1
        yield tuple(row.get(column) for column in COLUMNS)


class _Reader:
    """Rows of the dataset → `_Row`, checked; counts what it drops."""

    def __init__(
        self, vocab_size: int, special_ids: tuple[int, ...], continuations: np.ndarray, relations: str | None
    ) -> None:
        self._vocab_size, self._special_ids, self._continuations = vocab_size, special_ids, continuations
        self._given = _relation_names(relations) if relations is not None else None
        self.names = RelationNames()
        self._reasons: dict[str, dict[str, Any]] = {}
        self._row = 0

    def __call__(self, tokens: Any, heads: Any, relations: Any, counts: Counter[str]) -> _Row | None:
        """The row, or None when it cannot be used."""
        self._row += 1
        reason = self._fault(tokens, heads, relations)
        if reason is None:
            return self._read(np.array(tokens, np.int64), np.array(heads, np.int64), relations, counts)
        counts["rows_left_out"] += 1
        entry = self._reasons.setdefault(reason, {"count": 0, "examples": []})
        entry["count"] += 1
        if entry["count"] <= 5:
            entry["examples"].append({"where": f"row {self._row}", "reason": reason})
        return None

    def _fault(self, tokens: Any, heads: Any, relations: Any) -> str | None:
        """Why a row cannot be used."""
        if not all(isinstance(column, list) and None not in column for column in (tokens, heads, relations)):
            return "values missing"
        if not len(tokens) == len(heads) == len(relations):
            return "columns of different lengths"
        if not tokens:
            return "an empty row"
        if not all(isinstance(value, int) for value in (*tokens, *heads)):
            return "ids or heads that are no whole numbers"
        return "ids outside the vocabulary" if min(tokens) < 0 or max(tokens) >= self._vocab_size else None

    def report(self) -> dict[str, Any]:
        """Counts and examples of rows left out, by reason."""
        return self._reasons

    def _read(self, tokens: np.ndarray, heads: np.ndarray, relations: Any, counts: Counter[str]) -> _Row:
        places, size = np.arange(len(tokens)), len(tokens)
        special = np.isin(tokens, self._special_ids)
        outside = (heads < -1) | (heads >= size)
        to_self = heads == places
        target = np.where((heads < 0) | outside, 0, heads)
        of_special = (heads >= 0) & ~outside & ~to_self & (special | special[target])
        counts["edges_outside"] += int(outside.sum())
        counts["edges_to_self"] += int(to_self.sum())
        counts["edges_of_specials"] += int(of_special.sum())
        counts["edges_to_last_token"] += int((heads == size - 1).sum())
        was_word = (heads != -1) & ~special
        heads = np.where(outside | to_self | of_special, -1, heads)
        counts["rows_without_edges"] += not (heads >= 0).any()
        numbers = np.where(special, 0, self._numbers(relations, counts))
        was_word |= numbers > 0
        was_word[heads[heads >= 0]] = True
        words = _word_starts(was_word, special, self._continuations[tokens])
        return _Row(tokens, heads, _boundaries(words, heads, special), np.where(words, numbers, 0))

    def _numbers(self, relations: Any, counts: Counter[str]) -> np.ndarray:
        """(P,) common numbers of a row's relations, given as numbers or names."""
        values, inverse = np.unique(np.asarray(relations), return_inverse=True)
        if np.issubdtype(values.dtype, np.number):
            counts["relations_negative"] += int((values[inverse] < -1).sum())
            values = np.maximum(values, -1)
        return np.array([self._number(value.item()) for value in values])[inverse]

    def _number(self, value: int | str) -> int:
        if value in (-1, "-1", "", None):
            return 0
        if isinstance(value, str):
            return relation_number(self.names, value)
        if self._given is not None and value >= len(self._given):
            raise InputError(f"--relations: names {len(self._given)} relations, but the dataset has number {value}")
        return relation_number(self.names, self._given[value] if self._given is not None else f"relation-{value}")


def _relation_names(path: str) -> list[str]:
    names = Path(path).read_text(encoding="utf-8").split()
    if not names:
        raise InputError(f"--relations {path}: is empty; give a name a line, that of number 0 first")
    return names


def _word_starts(was_word: np.ndarray, special: np.ndarray, continuation: np.ndarray) -> np.ndarray:
    """(P,) bool: by the parse where a run between special tokens has one, else by the tokenizer's marking."""
    run = np.cumsum(special)
    parsed = np.bincount(run, weights=was_word, minlength=run[-1] + 1)[run] > 0
    return ~special & np.where(parsed, was_word, ~continuation)


def _boundaries(words: np.ndarray, heads: np.ndarray, special: np.ndarray) -> np.ndarray:
    """(P,) uint8: word starts, and sentence starts: word starts that no edge spans, after a span or a special token.

    In a run between special tokens without any edge, only the first word is known to start a sentence.
    """
    dependents = np.flatnonzero(heads >= 0)
    left, right = np.minimum(dependents, heads[dependents]), np.maximum(dependents, heads[dependents])
    change = np.zeros(len(words) + 1, dtype=np.int64)
    np.add.at(change, left + 1, 1)
    np.add.at(change, right + 1, -1)
    spanned = np.cumsum(change)[:-1] > 0  # an edge goes from before this place to it or beyond
    boundaries = words.astype(np.uint8) * WORD_START
    starts = words & ~spanned
    run = np.cumsum(special)
    has_edge = np.zeros(run[-1] + 1, dtype=bool)
    has_edge[run[dependents]] = has_edge[run[heads[dependents]]] = True
    unknown = np.flatnonzero(starts & ~has_edge[run])
    starts[unknown[1:][run[unknown[1:]] == run[unknown[:-1]]]] = False
    boundaries[starts] |= SENTENCE_START
    return boundaries


def _pack(packer: Packer, row: _Row, special_ids: tuple[int, ...]) -> int:
    """Hand the runs between special tokens to the packer, each as a document of its own; returns edges between them."""
    across = 0
    special = np.isin(row.tokens, special_ids)
    offsets = np.where(row.heads >= 0, row.heads - np.arange(len(row.heads)), 0).astype(np.int32)
    bounds = np.flatnonzero(np.diff(np.concatenate(([True], special, [True])).astype(np.int8)))
    for start, end in zip(bounds[::2], bounds[1::2], strict=True):
        run = slice(start, end)
        target = np.arange(start, end) + offsets[run]
        inside = np.where((target >= start) & (target < end), offsets[run], 0)
        across += int(np.count_nonzero(offsets[run])) - int(np.count_nonzero(inside))
        packer.start_document()
        packer.add(row.tokens[run].astype(np.int32), inside, row.boundaries[run], row.relations[run].astype(np.uint8))
    return across
