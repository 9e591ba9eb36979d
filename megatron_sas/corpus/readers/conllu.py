"""Reading CoNLL-U: syntactic words, their heads, and the text behind them.

The format: https://universaldependencies.org/format.html.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from megatron_sas.corpus.readers.base import Reader, Reading, Unit
from megatron_sas.corpus.readers.text_lines import Bad, read_lines, refuse
from megatron_sas.corpus.readers.trees import check_blanked, is_blanked, tree_fault, word_spans

_ID = re.compile(r"([1-9][0-9]*)(?:-([1-9][0-9]*))?|[0-9]+\.[1-9][0-9]*")
_COLUMNS = 10


@dataclass
class ConlluSentence:
    """One sentence; lists have one entry per syntactic word (multiword tokens are taken apart, empty nodes left out).

    `heads[i]` is the 0-based index of word i's head, -1 for a root. `text` is the surface text rebuilt from FORM and
    SpaceAfter=No, and `spans[i]` the characters [start, end) of word i in it (`trees.word_spans` of multiword tokens).
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
    path: str | Path, bad: Bad = refuse, blanked: Callable[[str], object] = lambda where: None
) -> Iterator[ConlluSentence]:
    """Yield the sentences of a CoNLL-U file (also .gz, .xz, .zst), one in memory at a time.

    Checked: ten columns, ids 1, 2, 3 …, a head that is a number, a tree (`trees.tree_fault`), valid UTF-8. A broken
    sentence is left out after `bad(where, reason)`, which may raise. Sentences without their words
    (`trees.is_blanked`) are left out, each after `blanked(where)`; a file that has only these raises `InputError`.
    """
    newdoc, num_blanked, others = False, 0, 0
    for first_line, lines in _blocks(path, bad):
        newdoc = newdoc or any(re.match(r"#\s*newdoc\b", text) for _, text in lines if text is not None)
        if any(text is None for _, text in lines):
            others += 1
            continue  # it was `bad` already
        if all(text.startswith("#") for _, text in lines):
            continue
        try:
            sentence = _parse(first_line, lines)
        except _Malformed as error:
            line, reason = error.args
            bad(f"{path}:{line}", reason)
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


def _blocks(path: str | Path, bad: Bad) -> Iterator[tuple[int, list[tuple[int, str | None]]]]:
    """Yield (first line number, numbered lines) of each run of lines between blank ones."""
    for blank, block in groupby(read_lines(path, bad), lambda line: line[1] is not None and not line[1].strip()):
        if not blank:
            lines = list(block)
            yield lines[0][0], lines


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
        identity, form, *_, head, deprel, _, misc = columns
        match = _ID.fullmatch(identity)
        if not match:
            raise _Malformed(number, f"column ID is {identity!r}")
        if match[1] is None:
            continue  # an empty node, such as 8.1
        if not form.strip():
            raise _Malformed(number, "column FORM is empty")
        space = "SpaceAfter=No" not in misc.split("|")
        first = int(match[1])
        if first != len(words) + 1:
            raise _Malformed(number, f"column ID is {identity} where {len(words) + 1} is due")
        if match[2] is not None:
            if int(match[2]) <= first or first <= covered:
                raise _Malformed(number, f"multiword token {identity} is empty or overlaps another")
            covered = int(match[2])
            surface.append((form, covered - first + 1, space))
            continue
        if not re.fullmatch(r"[0-9]+", head):
            raise _Malformed(number, f"column HEAD is {head!r}, not a number")
        words.append(form)
        heads.append(int(head) - 1)
        deprels.append(deprel)
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
    text, spans = "", []
    for number, (form, count, space) in enumerate(surface):
        inner = words[len(spans) : len(spans) + count]
        spans += word_spans(inner, form, len(text), len(text) + len(form))
        text += form + (" " if space and number + 1 < len(surface) else "")
    return text, spans


def _units(name: str, reading: Reading) -> Iterator[Unit]:
    starts = True
    for sentence in read_conllu(name, reading.bad, lambda _: reading.counts.update(["sentences_blanked"])):
        reading.skipped.keep(name)
        yield Unit(sentence, starts or sentence.newdoc, f"{name}:{sentence.line}")
        starts = False


CONLLU = Reader(_units, gold=True)
