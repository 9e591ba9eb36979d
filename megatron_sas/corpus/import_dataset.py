"""A tokenised Hugging Face dataset with dependency heads, as the paper published it → packed data.

Columns: `input_ids`, `heads` (position of the head's first token in the same row) and `relns` (number or name of the
relation); -1 is none. Rows `[CLS] … [SEP]` of exactly the sequence length are taken as they are; all others (shorter,
longer, padded) are packed again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_sas.core.cli import InputError, progress
from megatron_sas.corpus.build.pack import Packer
from megatron_sas.corpus.build.packed_writer import MAX_RELATIONS, PackedWriter, check_seq_length
from megatron_sas.corpus.build.skipped import add_example
from megatron_sas.corpus.parsers.base import RelationNames
from megatron_sas.corpus.readers.hub import read_rows
from megatron_sas.corpus.readers.registry import input_files, source_name
from megatron_sas.corpus.readers.text_lines import check_file_name
from megatron_sas.data.packed import SENTENCE_START, WORD_START
from megatron_sas.data.tokenizer import load_tokenizer, tokenizer_info
from megatron_sas.data.unknown import Unknown

COLUMNS = ("input_ids", "heads", "relns")


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


class _Row(NamedTuple):
    """Streams of a row (P,): `heads` are positions in the row or -1, `relations` common numbers, 0 for none."""

    tokens: np.ndarray
    heads: np.ndarray
    boundaries: np.ndarray
    relations: np.ndarray


def import_dataset(
    name: str,
    tokenizer_path: str,
    output: str,
    seq_length: int = 512,
    relations: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write packed data and return its header, whose `counts` are of what was used and what was left out.

    The arguments are those of `tools/import_dataset.py`, whose --help explains each.

    Word starts are tokens with a head, a relation or a dependent; in text without a parse (between two special tokens),
    tokens that continue no word by the tokenizer's own marking. A sentence starts at a word start that no edge spans.

    Raises:
        InputError: columns missing, no row that can be used, too many relations.
    """
    check_seq_length(seq_length)
    check_file_name(name)
    tokenizer = load_tokenizer(tokenizer_path)
    info = tokenizer_info(tokenizer, tokenizer_path)
    reader = _Reader(info.special_ids, _continuations(tokenizer, info.vocab_size), relations)
    counts, report = reader.counts, {}
    with PackedWriter(output, seq_length, info, overwrite) as writer:
        packer = Packer(seq_length, info.cls_id, info.sep_id, writer.add)
        for columns in _rows(name, counts):
            if fault := _fault(*columns, info.vocab_size):
                counts["rows_left_out"] += 1
                add_example(report, fault, where=f"row {counts['rows']}", reason=fault)
                continue
            row = reader(*columns)
            unknown = Unknown.of(row.tokens, info.unk_id, info.special_ids)
            counts.update(pieces=unknown.tokens, pieces_unknown=unknown.unknown)
            if (
                len(row.tokens) == seq_length
                and (row.tokens[0], row.tokens[-1]) == (info.cls_id, info.sep_id)
                and not np.isin(row.tokens[1:-1], (info.pad_id, info.cls_id)).any()
            ):
                writer.add(*row)
                counts.update(rows_as_they_are=1, edges=int((row.heads >= 0).sum()))
            else:
                counts.update(rows_packed_anew=1, edges_across_separators=_pack(packer, row, info.special_ids))
        packer.finish()
        if not writer.num_sequences:
            raise InputError(
                f"{name}: {counts['rows']} rows, {counts['rows_left_out']} of them left out; nothing fills a sequence "
                f"of {seq_length}"
            )
        counts.update({kind: packer.counts[kind] for kind in ("edges", "edges_cut", "tail_pieces", "tail_edges")})
        counts["sequences"] = writer.num_sequences
        return writer.finish(
            reader.names.names,
            parser={"name": "imported"},
            inputs=[source_name(name)],
            input_files=input_files([name]),
            counts={kind: counts[kind] for kind in COUNTS},
            report=report,
        )


def _continuations(tokenizer: Any, vocab_size: int) -> np.ndarray:
    """(V,) bool: tokens that continue a word. By "##" if the model marks them so, else by the lack of "▁" or "Ġ"."""
    prefix = getattr(tokenizer.backend_tokenizer.model, "continuing_subword_prefix", None)
    result = np.zeros(vocab_size, dtype=bool)
    for token, number in tokenizer.get_vocab().items():
        result[number] = token.startswith(prefix) if prefix else not token.startswith(("▁", "Ġ"))
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


def _fault(tokens: Any, heads: Any, relations: Any, vocab_size: int) -> str | None:
    """Why a row cannot be used."""
    if not all(isinstance(column, list) and None not in column for column in (tokens, heads, relations)):
        return "values missing"
    if not len(tokens) == len(heads) == len(relations):
        return "columns of different lengths"
    if not tokens:
        return "an empty row"
    if not all(isinstance(value, int) for value in (*tokens, *heads)):
        return "ids or heads that are no whole numbers"
    return "ids outside the vocabulary" if min(tokens) < 0 or max(tokens) >= vocab_size else None


class _Reader:
    """Columns of a row without fault → `_Row`; counts what it drops."""

    def __init__(self, special_ids: tuple[int, ...], continuations: np.ndarray, relations: str | None) -> None:
        self._special_ids, self._continuations = special_ids, continuations
        self._given: list[str] | None = None
        if relations is not None:
            self._given = Path(relations).read_text(encoding="utf-8").split()
            if not self._given:
                raise InputError(f"--relations {relations}: is empty; give a name a line, that of number 0 first")
        self.names = RelationNames(MAX_RELATIONS)
        self.counts: Counter[str] = Counter()

    def __call__(self, tokens: list[int], heads: list[int], relations: list[Any]) -> _Row:
        tokens, heads = np.array(tokens, np.int64), np.array(heads, np.int64)
        size = len(tokens)
        special = np.isin(tokens, self._special_ids)
        outside = (heads < -1) | (heads >= size)
        to_self = heads == np.arange(size)
        target = np.where((heads < 0) | outside, 0, heads)
        of_special = (heads >= 0) & ~outside & ~to_self & (special | special[target])
        was_word = (heads != -1) & ~special
        to_last = heads == size - 1
        heads = np.where(outside | to_self | of_special, -1, heads)
        dropped = {"outside": outside, "to_self": to_self, "of_specials": of_special, "to_last_token": to_last}
        self.counts.update({f"edges_{reason}": int(which.sum()) for reason, which in dropped.items()})
        self.counts["rows_without_edges"] += not (heads >= 0).any()
        numbers = np.where(special, 0, self._numbers(relations))
        was_word |= numbers > 0
        was_word[heads[heads >= 0]] = True
        words = _word_starts(was_word, special, self._continuations[tokens])
        return _Row(tokens, heads, _boundaries(words, heads, special), np.where(words, numbers, 0))

    def _numbers(self, relations: list[Any]) -> np.ndarray:
        """(P,) common numbers of a row's relations, given as numbers or names."""
        values, inverse = np.unique(np.asarray(relations), return_inverse=True)
        if np.issubdtype(values.dtype, np.number):
            self.counts["relations_negative"] += int((values[inverse] < -1).sum())
            values = np.maximum(values, -1)
        return np.array([self._number(value.item()) for value in values])[inverse]

    def _number(self, value: int | str) -> int:
        if value in (-1, "-1", "", None):
            return 0
        if not isinstance(value, str) and self._given is None:
            value = f"relation-{value}"
        elif not isinstance(value, str):
            if value >= len(self._given):
                raise InputError(f"--relations: names {len(self._given)} relations, but the dataset has number {value}")
            value = self._given[value]
        return self.names.number(value)


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
    """Hand the runs between special tokens to the packer, each as a document; returns how many edges lead across."""
    special = np.isin(row.tokens, special_ids)
    run = np.cumsum(special)
    edge = row.heads >= 0  # neither at special tokens nor to them
    inside = edge & (run[row.heads] == run)
    offsets = np.where(inside, row.heads - np.arange(len(edge)), 0)
    ordinary = np.flatnonzero(~special)
    for places in np.split(ordinary, np.flatnonzero(np.diff(run[ordinary])) + 1):
        packer.start_document()
        packer.add(row.tokens[places], offsets[places], row.boundaries[places], row.relations[places])
    return int(edge.sum() - inside.sum())
