"""Input files and datasets → units of text (a paragraph or a CoNLL-U sentence), one at a time."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_sas.core.cli import InputError
from megatron_sas.core.files import sha256_file
from megatron_sas.corpus.build.skipped import Losses
from megatron_sas.corpus.hub import check_name, dataset_version, read_rows
from megatron_sas.corpus.readers.conllu import ConlluSentence, read_conllu
from megatron_sas.corpus.readers.line_breaks import LineBreaks, join, paragraphs, wrap_width
from megatron_sas.corpus.readers.text_lines import (
    COMPRESSED,
    DamagedFile,
    OnError,
    check_file_name,
    handle_bad,
    is_encodable,
    read_lines,
)

MAX_UNIT_CHARACTERS = 20_000  # longer paragraphs are cut at white space: a parser's memory grows with the text

_WINDOW_CHARACTERS = 1 << 14  # of a text file, about which it is decided at once whether it is hard-wrapped
_SPACES = re.compile(r"[ \t]{2,}")  # spaCy takes all but one for words, which changes its parses

# Control characters: some separate words, the others stand between letters by mistake. Tabs stay.
_CONTROLS = {code: " " if chr(code).isspace() else None for code in (*range(32), *range(127, 160)) if code != 9}
_CONTROLS |= dict.fromkeys((0xFEFF, 0xFFFE, 0xFFFF))
_CONTROL = re.compile("[" + "".join(map(re.escape, map(chr, _CONTROLS))) + "]")


@dataclass
class Unit:
    """A paragraph (str) or sentence; `content` is None for a document without text. `where` is "file:line"."""

    content: str | ConlluSentence | None
    starts_document: bool
    where: str
    document_id: str | None = None  # field `id` of the document that starts here
    as_read: str | None = None  # the paragraph before lines were joined or spaces squeezed; "" if a unit before has it


@dataclass(frozen=True)
class Paragraph:
    """Lines [start, end) of a text as one, and `Unit.as_read`."""

    start: int
    end: int
    text: str
    as_read: str | None

    def units(self, starts_document: bool, where: str, document_id: str | None, reading: Reading) -> Iterator[Unit]:
        """The paragraph as units that are short enough for a parser; the first has the identity and `as_read`."""
        as_read = self.as_read
        for part in _cut(self.text, reading):
            yield Unit(part, starts_document, where, document_id if starts_document else None, as_read)
            starts_document, as_read = False, as_read and ""


@dataclass
class Reading:
    """How to read: the field that holds the text, what to do with broken input, what a document is; what happened."""

    text_field: str = "text"
    on_error: OnError = None
    losses: Losses = field(default_factory=Losses)
    rows_per_document: int | None = None  # a document is so many records, whatever the input says
    line_breaks: LineBreaks = "auto"  # whether a line is a paragraph, or a part of one
    paragraphs_cut: int = 0
    words_cut: int = 0  # cuts of a paragraph inside a word, there being no space
    paragraphs_with_controls: int = 0  # control characters were taken out of them
    paragraphs_squeezed: int = 0  # two spaces or more became one in them
    lines_joined: int = 0  # to the line before them
    sentences_blanked: int = 0  # of treebanks without their words, left out

    def bad(self, where: str, reason: str, *, used: bool = False) -> None:
        """Refuse broken input or count it (see `Losses.lose`)."""
        handle_bad(where, reason, self.on_error, lambda *what: self.losses.lose(*what, used=used))

    def blanked(self, where: str) -> None:
        """Count a sentence that was left out because its words are missing."""
        self.sentences_blanked += 1

    def clean(self, line: str) -> str:
        """`line` without control characters and space around it."""
        if _CONTROL.search(line):
            self.paragraphs_with_controls += 1
            line = line.translate(_CONTROLS)
        return line.strip()

    def width(self, lines: Sequence[str]) -> int | None:
        """How `line_breaks.paragraphs` is to take the lines of a text."""
        if self.line_breaks == "auto":
            return wrap_width([line.expandtabs().rstrip() for line in lines])
        return 0 if self.line_breaks == "wrapped" else None

    def paragraphs(self, lines: Sequence[str], width: int | None) -> Iterator[Paragraph]:
        """Yield the paragraphs of a text; lines that are in none are blank."""
        cleaned = [self.clean(line) for line in lines]
        if width is None:
            measured = cleaned
        else:  # as long as they are on a page
            measured = [line.expandtabs().rstrip() if clean else "" for line, clean in zip(lines, cleaned, strict=True)]
        for start, end in paragraphs(measured, width):
            text = join(cleaned[start:end])
            self.lines_joined += end - start - 1
            if _SPACES.search(text):
                self.paragraphs_squeezed += 1
                text = _SPACES.sub(" ", text)
            as_read = "\n".join(cleaned[start:end])
            yield Paragraph(start, end, text, as_read if as_read != text else None)


def input_format(name: str) -> str:
    """`txt`, `jsonl`, `conllu` or `hf`, by the name; `InputError` for anything else or a missing file."""
    check_file_name(name)
    if name.startswith("hf:"):
        check_name(name)
        return "hf"
    path = Path(name)
    suffix = Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix
    if suffix not in (".txt", ".jsonl", ".conllu"):
        raise InputError(f"{name}: unknown input; give .txt, .jsonl, .conllu (also .gz, .xz, .zst) or hf:NAME:SPLIT")
    if not path.is_file():
        raise InputError(f"{name}: no such file; check its name")
    return suffix[1:]


def source_name(name: str) -> str:
    """What an input is called in headers and reports: a file without its folder, a dataset in full."""
    return name if name.startswith("hf:") else Path(name).name


def input_files(inputs: list[str]) -> list[dict[str, Any]]:
    """Of every input its `name` (`source_name`) and what tells it from others of that name: `size` and `sha256` of a
    file, `dataset_version` of a dataset."""
    return [
        {"name": source_name(name)}
        | (
            dataset_version(name)
            if name.startswith("hf:")
            else {"size": Path(name).stat().st_size, "sha256": sha256_file(name)}
        )
        for name in inputs
    ]


def read_units(inputs: list[str], reading: Reading) -> Iterator[Unit]:
    """Yield the units of all inputs in order; every input begins a new document.

    Raises:
        InputError: broken input (unless it is skipped), or more of it in one input than `reading.losses` allows.
    """
    readers = {"txt": _read_text, "jsonl": _read_json_lines, "conllu": _read_conllu, "hf": _read_hub}
    for name in inputs:
        unit, joined = None, reading.lines_joined
        try:
            units = readers[input_format(name)](name, reading)
            if reading.rows_per_document is not None:
                units = _grouped(units, reading.rows_per_document)
            for unit in units:
                yield unit
        except DamagedFile as error:
            if reading.on_error != "skip":
                raise
            place = "the beginning" if unit is None else f"line {unit.where.rpartition(':')[2]}"
            reason = str(error).removeprefix(f"{name}: ")
            reading.losses.lose(f"{name}:end", f"{reason}; nothing is read after {place}", unread=error.unread)
        if (joined := reading.lines_joined - joined) and reading.line_breaks == "auto" and reading.losses.show:
            print(
                f"{name}: looks hard-wrapped: {joined:,} lines are joined to the line before them; --line-breaks "
                "paragraph keeps them apart",
                file=sys.stderr,
            )
        reading.losses.check(name)


def _grouped(units: Iterable[Unit], rows: int) -> Iterator[Unit]:
    """The units of an input with a new document every `rows` records that could be read, and nowhere else."""
    number, last = 0, ""
    for unit in units:
        unit.starts_document = unit.where != last and number % rows == 0
        number += unit.where != last
        last = unit.where
        if unit.starts_document or unit.content is not None:
            yield unit


def _read_text(name: str, reading: Reading) -> Iterator[Unit]:
    """A paragraph a line, or several lines (see `Reading.width`); blank lines separate documents."""
    starts, last, width = True, 0, None
    for window, is_rest in _windows(read_lines(name, reading.on_error, reading.losses.lose, cut_long=True)):
        numbers, lines = [number for number, _ in window], [line for _, line in window]
        if not is_rest:  # a rest is too little to judge by, and likely to be as what came before
            width = reading.width(lines)
        end = 0
        for paragraph in reading.paragraphs(lines, width):
            starts = starts or paragraph.start > end
            if numbers[paragraph.start] != last:
                reading.losses.keep(name)
                last = numbers[paragraph.start]
            yield from paragraph.units(starts, f"{name}:{last}", None, reading)
            starts, end = False, paragraph.end
        starts = starts or end < len(lines)


def _windows(lines: Iterable[tuple[int, str | None]]) -> Iterator[tuple[list[tuple[int, str]], bool]]:
    """Numbered lines that could be read, in groups that end at a blank line if they can, and whether these are the rest
    of several groups. What was read before damage comes before its error."""
    window: list[tuple[int, str]] = []
    size, is_first = 0, True
    try:
        for number, line in lines:
            if line is None:
                continue
            window.append((number, line))
            size += 1 + len(line)
            if size >= _WINDOW_CHARACTERS and (not line.strip() or size >= 2 * _WINDOW_CHARACTERS):
                yield window, False
                window, size, is_first = [], 0, False
    except DamagedFile:
        if window:
            yield window, not is_first
        raise
    if window:
        yield window, not is_first


def _read_json_lines(name: str, reading: Reading) -> Iterator[Unit]:
    """One document a line, an object whose text field holds paragraphs on lines of their own."""
    for number, line in read_lines(name, reading.on_error, reading.losses.lose):
        if line is None or not line.strip():
            continue
        where = f"{name}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reading.bad(where, f"invalid JSON ({error})")
            continue
        yield from _record_units(record, where, reading)


def _read_hub(name: str, reading: Reading) -> Iterator[Unit]:
    """One document a row of a Hugging Face dataset."""
    for number, row in enumerate(read_rows(name, reading.rows_per_document or 1), 1):
        yield from _record_units(row, f"{name}:{number}", reading)


def _record_units(record: object, where: str, reading: Reading) -> Iterator[Unit]:
    if not isinstance(record, dict) or reading.text_field not in record:
        reading.bad(where, f"no field {reading.text_field!r}; --text-field names the field that holds the text")
        return
    text = record[reading.text_field]
    if not isinstance(text, str):
        reading.bad(where, f"not a string in field {reading.text_field!r}")
        return
    if not is_encodable(text):
        reading.bad(where, f"half of a surrogate pair in field {reading.text_field!r}")
        return
    reading.losses.keep(where.rpartition(":")[0])
    identity = None if record.get("id") is None else str(record["id"])
    starts, lines = True, text.split("\n")
    for paragraph in reading.paragraphs(lines, reading.width(lines)):
        yield from paragraph.units(starts, where, identity, reading)
        starts = False
    if starts:
        yield Unit(None, True, where, identity)


def _read_conllu(name: str, reading: Reading) -> Iterator[Unit]:
    starts = True
    for sentence in read_conllu(name, reading.on_error, reading.losses.lose, reading.blanked):
        reading.losses.keep(name)
        yield Unit(sentence, starts or sentence.newdoc, f"{name}:{sentence.line}")
        starts = False


def _cut(text: str, reading: Reading) -> Iterator[str]:
    """Parts of at most `MAX_UNIT_CHARACTERS`, cut after white space where the second half of a part has some."""
    while len(text) > MAX_UNIT_CHARACTERS:
        space = text.rfind(" ", MAX_UNIT_CHARACTERS // 2, MAX_UNIT_CHARACTERS)
        cut = space + 1 if space >= 0 else MAX_UNIT_CHARACTERS
        reading.paragraphs_cut += 1
        reading.words_cut += space < 0 and not (text[cut - 1].isspace() or text[cut].isspace())
        yield text[:cut].rstrip()
        text = text[cut:].lstrip()
    if text:
        yield text
