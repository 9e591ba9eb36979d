"""Input files and datasets → units of text (a paragraph or a CoNLL-U sentence), one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_sas.cli import InputError
from megatron_sas.data.conllu import ConlluSentence, read_conllu
from megatron_sas.data.text_lines import COMPRESSED, OnError, Report, handle_bad, read_lines

MAX_UNIT_CHARACTERS = 20_000  # longer paragraphs are cut at white space: a parser's memory grows with the text


@dataclass
class Unit:
    """A paragraph (str) or sentence; `content` is None for a document without text. `where` is "file:line"."""

    content: str | ConlluSentence | None
    starts_document: bool
    where: str


@dataclass
class Reading:
    """How to read: which field of JSON and datasets holds the text, what to do with broken input, whom to tell."""

    text_field: str = "text"
    on_error: OnError = "refuse"
    report: Report | None = None
    paragraphs_cut: int = 0  # counted here

    def bad(self, where: str, reason: str) -> None:
        handle_bad(where, reason, self.on_error, self.report)


def input_format(name: str) -> str:
    """`txt`, `jsonl`, `conllu` or `hf`, by the name; `InputError` for anything else or a missing file."""
    if name.startswith("hf:"):
        if not 3 <= len(name.split(":")) <= 4 or not all(name.split(":")):
            raise InputError(f"--input {name}: must read hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT")
        return "hf"
    path = Path(name)
    suffix = Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix
    if suffix not in (".txt", ".jsonl", ".conllu"):
        raise InputError(f"{name}: unknown input; give .txt, .jsonl, .conllu (also .gz, .xz, .zst) or hf:NAME:SPLIT")
    if not path.is_file():
        raise InputError(f"{name}: no such file; check --input")
    return suffix[1:]


def read_units(inputs: list[str], reading: Reading) -> Iterator[Unit]:
    """Yield the units of all inputs in order; every input begins a new document."""
    readers = {"txt": _read_text, "jsonl": _read_json_lines, "conllu": _read_conllu, "hf": _read_hub}
    for name in inputs:
        yield from readers[input_format(name)](name, reading)


def _read_text(name: str, reading: Reading) -> Iterator[Unit]:
    """One paragraph a line; blank lines separate documents."""
    starts = True
    for number, line in read_lines(name, reading.on_error, reading.report, cut_long=True):
        if line is None:
            continue
        if not (line := line.strip()):
            starts = True
            continue
        for part in _cut(line, reading):
            yield Unit(part, starts, f"{name}:{number}")
            starts = False


def _read_json_lines(name: str, reading: Reading) -> Iterator[Unit]:
    """One document a line, an object whose text field holds paragraphs on lines of their own."""
    for number, line in read_lines(name, reading.on_error, reading.report):
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
    """One document a row of a Hugging Face dataset, streamed: `hf:NAME:SPLIT` or `hf:NAME:CONFIG:SPLIT`."""
    try:
        import datasets
    except ImportError:
        raise InputError(f"--input {name}: needs the package datasets; pip install datasets") from None
    _, dataset, *config, split = name.split(":")
    try:
        rows = datasets.load_dataset(dataset, *config, split=split, streaming=True)
    except Exception as error:  # the library raises many kinds for wrong names, and its own text says which
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"--input {name}: cannot be opened ({type(error).__name__}: {reason})") from error
    for number, row in enumerate(rows, 1):
        yield from _record_units(row, f"{name}:{number}", reading)


def _record_units(record: object, where: str, reading: Reading) -> Iterator[Unit]:
    if not isinstance(record, dict) or reading.text_field not in record:
        reading.bad(where, f"no field {reading.text_field!r}; --text-field names the field that holds the text")
        return
    text = record[reading.text_field]
    if not isinstance(text, str):
        reading.bad(where, f"field {reading.text_field!r} is not a string")
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        reading.bad(where, f"field {reading.text_field!r} holds half of a surrogate pair")
        return
    starts = True
    for line in text.split("\n"):
        if line := line.strip():
            for part in _cut(line, reading):
                yield Unit(part, starts, where)
                starts = False
    if starts:
        yield Unit(None, True, where)


def _read_conllu(name: str, reading: Reading) -> Iterator[Unit]:
    starts = True
    for sentence in read_conllu(name, reading.on_error, reading.report):
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
