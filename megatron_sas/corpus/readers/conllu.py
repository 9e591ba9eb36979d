"""Reading CoNLL-U: syntactic words, their heads, and the text behind them.

The format: https://universaldependencies.org/format.html.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron_sas.corpus.readers.base import Reader, Reading, Unit
from megatron_sas.corpus.readers.text_lines import OnError, Report, handle_bad, read_lines
from megatron_sas.corpus.readers.trees import check_blanked, is_blanked, tree_fault

_ID = re.compile(r"([1-9][0-9]*)(?:-([1-9][0-9]*))?|[0-9]+\.[1-9][0-9]*")
_ID_COLUMN, _FORM, _HEAD, _DEPREL, _MISC, _COLUMNS = 0, 1, 6, 7, 9, 10


@dataclass
class ConlluSentence:
    """One sentence; lists have one entry per syntactic word (multiword tokens are taken apart, empty nodes left out).

    `heads[i]` is the 0-based index of word i's head, -1 for a root. `text` is the surface text rebuilt from FORM and
    SpaceAfter=No, and `spans[i]` the characters [start, end) of word i in it. The words of a multiword token share its
    characters when their forms concatenate to it; else the first has them all and the others an empty span.
    """

    words: list[str]
    heads: list[int]
    deprels: list[str]
    text: str
    spans: list[tuple[int, int]]
    line: int  # of the first comment or word, from 1
    newdoc: bool  # whether `# newdoc` stands before this sentence (or before one just before it that was left out)
    comments: list[str] = field(default_factory=list)  # lines beginning with "#", without it


class _Malformed(Exception):
    """A sentence that cannot be used: line number and reason."""


def read_conllu(
    path: str | Path,
    on_error: OnError = None,
    report: Report | None = None,
    blanked: Callable[[str], None] = lambda where: None,
) -> Iterator[ConlluSentence]:
    """Yield the sentences of a CoNLL-U file (also .gz, .xz, .zst), one in memory at a time.

    Checked: ten columns, ids 1, 2, 3 …, a head that is a number, a tree (`trees.tree_fault`), valid UTF-8. A broken
    sentence raises `InputError` naming file and line, or, when `on_error` is "skip", is left out after
    `report(where, reason)`. Sentences without their words (`trees.is_blanked`) are left out, each after
    `blanked(where)`; a file that has only these raises `InputError`.
    """
    newdoc, num_blanked, others = False, 0, 0
    for first_line, lines in _blocks(path, on_error, report):
        newdoc = newdoc or any(re.match(r"#\s*newdoc\b", text) for _, text in lines if text is not None)
        if any(text is None for _, text in lines):
            others += 1
            continue  # reported by read_lines
        if all(text.startswith("#") for _, text in lines):
            continue
        try:
            sentence = _parse(first_line, lines)
        except _Malformed as error:
            line, reason = error.args
            handle_bad(f"{path}:{line}", reason, on_error, report)
            others += 1
            continue
        if is_blanked(sentence.words):
            num_blanked += 1
            blanked(f"{path}:{first_line}")
            continue
        others += 1
        sentence.newdoc, newdoc = newdoc, False
        yield sentence
    if not others:
        check_blanked(path, num_blanked)


def _blocks(
    path: str | Path, on_error: OnError, report: Report | None
) -> Iterator[tuple[int, list[tuple[int, str | None]]]]:
    """Yield (first line number, numbered lines) of each run of lines between blank ones."""
    block: list[tuple[int, str | None]] = []
    for number, text in read_lines(path, on_error, report):
        if text is None or text.strip():
            block.append((number, text))
        elif block:
            yield block[0][0], block
            block = []
    if block:
        yield block[0][0], block


def _parse(first_line: int, lines: list[tuple[int, str]]) -> ConlluSentence:
    words, heads, deprels, numbers, comments = [], [], [], [], []
    surface: list[tuple[str, int, bool]] = []  # form, number of syntactic words, space after
    covered = 0  # the last word id that a multiword token covers
    for number, text in lines:
        if text.startswith("#"):
            comments.append(text[1:].strip())
            continue
        columns = text.split("\t")
        if len(columns) != _COLUMNS:
            raise _Malformed(number, f"{len(columns)} tab-separated columns instead of {_COLUMNS}")
        match = _ID.fullmatch(columns[_ID_COLUMN])
        if not match:
            raise _Malformed(number, f"column ID is {columns[_ID_COLUMN]!r}")
        if match[1] is None:
            continue  # an empty node, such as 8.1
        form = columns[_FORM]
        if not form.strip():
            raise _Malformed(number, "column FORM is empty")
        space = "SpaceAfter=No" not in columns[_MISC].split("|")
        first = int(match[1])
        if first != len(words) + 1:
            raise _Malformed(number, f"column ID is {columns[_ID_COLUMN]} where {len(words) + 1} is due")
        if match[2] is not None:
            if int(match[2]) <= first or first <= covered:
                raise _Malformed(number, f"multiword token {columns[_ID_COLUMN]} is empty or overlaps another")
            covered = int(match[2])
            surface.append((form, covered - first + 1, space))
            continue
        if not re.fullmatch(r"[0-9]+", columns[_HEAD]):
            raise _Malformed(number, f"column HEAD is {columns[_HEAD]!r}, not a number")
        words.append(form)
        heads.append(int(columns[_HEAD]) - 1)
        deprels.append(columns[_DEPREL])
        numbers.append(number)
        if first > covered:
            surface.append((form, 1, space))
    if covered > len(words):
        raise _Malformed(first_line, f"a multiword token ends at word {covered}, the sentence at {len(words)}")
    if fault := tree_fault(heads):
        word, reason = fault
        raise _Malformed(numbers[word], f"column HEAD is {heads[word] + 1}: word {word + 1} {reason}")
    text, spans = _rebuild(words, surface)
    return ConlluSentence(words, heads, deprels, text, spans, first_line, False, comments)


def _rebuild(words: list[str], surface: list[tuple[str, int, bool]]) -> tuple[str, list[tuple[int, int]]]:
    """Text and character spans of the syntactic words from the surface tokens."""
    parts: list[str] = []
    spans: list[tuple[int, int]] = []
    offset = 0
    for number, (form, count, space) in enumerate(surface):
        inner = words[len(spans) : len(spans) + count]
        end = offset + len(form)
        if "".join(inner) == form:
            for word in inner:
                spans.append((offset, offset + len(word)))
                offset += len(word)
        else:
            spans.append((offset, end))
            spans.extend([(end, end)] * (count - 1))
        offset = end
        parts.append(form)
        if space and number + 1 < len(surface):
            parts.append(" ")
            offset += 1
    return "".join(parts), spans


def _units(name: str, reading: Reading) -> Iterator[Unit]:
    starts = True
    for sentence in read_conllu(name, reading.on_error, reading.skipped.skip, reading.blanked):
        reading.skipped.keep(name)
        yield Unit(sentence, starts or sentence.newdoc, f"{name}:{sentence.line}")
        starts = False


CONLLU = Reader(_units, gold=True)
