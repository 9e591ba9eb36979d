"""Input files and datasets → units of text (a paragraph or a CoNLL-U sentence), one at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_sas.core.cli import InputError
from megatron_sas.core.files import sha256_file
from megatron_sas.corpus.build.skipped import Losses
from megatron_sas.corpus.hub import check_name, dataset_version, read_rows
from megatron_sas.corpus.readers.conllu import ConlluSentence, read_conllu
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


@dataclass
class Reading:
    """How to read: the field that holds the text, what to do with broken input, what a document is; what happened."""

    text_field: str = "text"
    on_error: OnError = "refuse"
    losses: Losses = field(default_factory=Losses)
    rows_per_document: int | None = None  # a document is so many records, whatever the input says
    paragraphs_cut: int = 0
    paragraphs_with_controls: int = 0  # control characters were taken out of them

    def bad(self, where: str, reason: str, *, used: bool = False) -> None:
        """Refuse broken input or count it (see `Losses.lose`)."""
        handle_bad(where, reason, self.on_error, lambda *what: self.losses.lose(*what, used=used))

    def clean(self, line: str) -> str:
        """`line` without control characters and space around it."""
        if _CONTROL.search(line):
            self.paragraphs_with_controls += 1
            line = line.translate(_CONTROLS)
        return line.strip()


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
        raise InputError(f"{name}: no such file; check --input")
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
        unit = None
        try:
            units = readers[input_format(name)](name, reading)
            if reading.rows_per_document is not None:
                units = _grouped(units, reading.rows_per_document)
            for unit in units:
                yield unit
        except DamagedFile as error:
            if reading.on_error == "refuse":
                raise
            place = "the beginning" if unit is None else f"line {unit.where.rpartition(':')[2]}"
            reason = str(error).removeprefix(f"{name}: ")
            reading.losses.lose(f"{name}:end", f"{reason}; nothing is read after {place}", unread=error.unread)
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
    """One paragraph a line; blank lines separate documents."""
    starts, last = True, 0
    for number, line in read_lines(name, reading.on_error, reading.losses.lose, cut_long=True):
        if line is None:
            continue
        if not (line := reading.clean(line)):
            starts = True
            continue
        if number != last:
            reading.losses.keep(name)
            last = number
        for part in _cut(line, reading):
            yield Unit(part, starts, f"{name}:{number}")
            starts = False


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
    starts = True
    for line in text.split("\n"):
        if line := reading.clean(line):
            for part in _cut(line, reading):
                yield Unit(part, starts, where, identity if starts else None)
                starts = False
    if starts:
        yield Unit(None, True, where, identity)


def _read_conllu(name: str, reading: Reading) -> Iterator[Unit]:
    starts = True
    for sentence in read_conllu(name, reading.on_error, reading.losses.lose):
        reading.losses.keep(name)
        yield Unit(sentence, starts or sentence.newdoc, f"{name}:{sentence.line}")
        starts = False


def _cut(text: str, reading: Reading) -> Iterator[str]:
    """Parts of at most `MAX_UNIT_CHARACTERS`, cut after white space where the second half of a part has some."""
    while len(text) > MAX_UNIT_CHARACTERS:
        cut = text.rfind(" ", MAX_UNIT_CHARACTERS // 2, MAX_UNIT_CHARACTERS) + 1 or MAX_UNIT_CHARACTERS
        reading.paragraphs_cut += 1
        yield text[:cut].rstrip()
        text = text[cut:].lstrip()
    if text:
        yield text
