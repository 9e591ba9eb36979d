"""What every reader of inputs shares: the units it yields, how it reads, and what it derives from an input's name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from megatron_sas.core.cli import InputError
from megatron_sas.core.files import sha256_file
from megatron_sas.corpus.build.skipped import SkipReport
from megatron_sas.corpus.readers.line_breaks import LineBreaks, join, paragraphs, wrap_width
from megatron_sas.corpus.readers.text_lines import OnError, is_encodable, refuse, without_compression

MAX_UNIT_CHARACTERS = 20_000  # longer paragraphs are cut at white space: a parser's memory grows with the text

_SPACES = re.compile(r"[ \t]{2,}")  # spaCy takes all but one for words, which changes its parses

# Control characters: some separate words, the others stand between letters by mistake. Tabs stay.
_CONTROLS = {code: " " if chr(code).isspace() else None for code in (*range(32), *range(127, 160)) if code != 9}
_CONTROLS |= dict.fromkeys((0xFEFF, 0xFFFE, 0xFFFF))
_CONTROL = re.compile("[" + "".join(map(re.escape, map(chr, _CONTROLS))) + "]")


class Gold(Protocol):
    """A sentence with gold heads, as one of the readers yields it and one of the parsers takes it."""

    text: str


@dataclass
class Unit:
    """A paragraph (str) or sentence; `content` is None for a document without text. `where` is "file:line"."""

    content: str | Gold | None
    starts_document: bool
    where: str
    document_id: str | None = None  # field `id` of the document that starts here
    as_read: str | None = None  # the paragraph before lines were joined or spaces squeezed; "" if a unit before has it

    @property
    def text(self) -> str:
        """Its text, "" for a document without any."""
        return "" if self.content is None else text_of(self.content)

    @property
    def input(self) -> str:
        """The name of the input that it comes from."""
        return self.where.rpartition(":")[0]


def text_of(content: str | Gold) -> str:
    """The text of a unit's content: a paragraph is its own."""
    return content if isinstance(content, str) else content.text


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
    """How to read: the field that holds the text, what to do with broken input, what a document is; what happened.

    `counts`: `paragraphs_cut`; `words_cut`, cuts of a paragraph inside a word, there being no space;
    `paragraphs_with_controls`, which were taken out; `paragraphs_squeezed`, in which two spaces or more became one;
    `lines_joined` to the line before them; `sentences_blanked`, left out of treebanks without their words.
    """

    text_field: str = "text"
    on_error: OnError = None
    skipped: SkipReport = field(default_factory=SkipReport)
    rows_per_document: int | None = None  # a document is this many records, whatever the input marks
    line_breaks: LineBreaks = "auto"  # whether a line is a paragraph, or a part of one
    max_unit_characters: int = MAX_UNIT_CHARACTERS
    counts: Counter[str] = field(default_factory=Counter)

    def bad(self, where: str, reason: str, *, used: bool = False) -> None:
        """Refuse broken input (`InputError`) or count it (see `SkipReport.skip`)."""
        if self.on_error is None:
            refuse(where, reason)
        if self.on_error == "refuse":
            refuse(where, reason, "correct it, or pass --on-error skip to leave such input out")
        self.skipped.skip(where, reason, used=used)

    def clean(self, line: str) -> str:
        """`line` without control characters and space around it."""
        if _CONTROL.search(line):
            self.counts["paragraphs_with_controls"] += 1
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
            self.counts["lines_joined"] += end - start - 1
            if _SPACES.search(text):
                self.counts["paragraphs_squeezed"] += 1
                text = _SPACES.sub(" ", text)
            as_read = "\n".join(cleaned[start:end])
            yield Paragraph(start, end, text, as_read if as_read != text else None)


@dataclass(kw_only=True)
class ReadSettings:
    """What all tools that read a corpus take; `tools/preprocess_data.py --help` explains each."""

    text_field: str = "text"
    on_error: OnError = "refuse"
    max_skipped: float = 0.05
    workers: int = 1
    rows_per_document: int | None = None
    line_breaks: LineBreaks = "auto"

    def check(self) -> None:
        """Raise `InputError` for a value out of bounds."""
        for name, value in (("workers", self.workers), ("rows-per-document", self.rows_per_document)):
            if value is not None and value < 1:
                raise InputError(f"--{name} {value}: must be at least 1")
        check_share("--max-skipped", self.max_skipped)

    def reading(self) -> Reading:
        """To read so, with what is left out shown."""
        skipped = SkipReport(self.max_skipped, show=True)
        return Reading(self.text_field, self.on_error, skipped, self.rows_per_document, self.line_breaks)


def check_share(option: str, value: float) -> None:
    """Raise `InputError` for what is no share of a whole."""
    if not 0 <= value <= 1:
        raise InputError(f"{option} {value}: must be a share from 0 to 1")


@dataclass(frozen=True)
class Reader:
    """Reads the files of one suffix. Readers of datasets replace the methods, each of which takes an input's name.

    `remark`: its note in --help. `gold`: its units are sentences with heads, for the parser that takes these.
    """

    units: Callable[[str, Reading], Iterator[Unit]]
    remark: str = ""
    gold: bool = False

    def check(self, name: str) -> None:
        """Raise `InputError` for an input that is missing, or named wrongly."""
        if not Path(name).is_file():
            raise InputError(f"{name}: no such file; check its name")

    def label(self, name: str) -> str:
        """What the input is called in headers and reports: a file without its folder."""
        return Path(name).name

    def place(self, name: str) -> object:
        """What two names of one input have in common."""
        return Path(name).resolve()

    def version(self, name: str) -> dict[str, Any]:
        """What tells the input from others with its label: a file's `size` in bytes and `sha256`."""
        return {"size": Path(name).stat().st_size, "sha256": sha256_file(name)}

    def output_name(self, name: str) -> str:
        """What packed data of this input alone are called: as the file, without its suffixes."""
        return without_compression(name).stem

    def dataset(self, label: str) -> str | None:
        """The dataset that an input with this label is a part of; None if it is no part."""
        return None


def record_units(record: object, where: str, reading: Reading) -> Iterator[Unit]:
    """A document from a record with a text field that holds paragraphs on lines of their own."""
    if not isinstance(record, dict) or reading.text_field not in record:
        reading.bad(where, f"no field {reading.text_field!r}; --text-field names the field that holds the text")
        return
    text = record[reading.text_field]
    if not isinstance(text, str) or not is_encodable(text):
        fault = "half of a surrogate pair" if isinstance(text, str) else "not a string"
        reading.bad(where, f"{fault} in field {reading.text_field!r}")
        return
    reading.skipped.keep(where.rpartition(":")[0])
    identity = None if record.get("id") is None else str(record["id"])
    starts, lines = True, text.split("\n")
    for paragraph in reading.paragraphs(lines, reading.width(lines)):
        yield from paragraph.units(starts, where, identity, reading)
        starts = False
    if starts:
        yield Unit(None, True, where, identity)


def _cut(text: str, reading: Reading) -> Iterator[str]:
    """Parts of at most `max_unit_characters`, cut after white space where the second half of a part has some."""
    limit = reading.max_unit_characters
    while len(text) > limit:
        space = text.rfind(" ", limit // 2, limit)
        cut = space + 1 if space >= 0 else limit
        reading.counts["paragraphs_cut"] += 1
        reading.counts["words_cut"] += space < 0 and not (text[cut - 1].isspace() or text[cut].isspace())
        yield text[:cut].rstrip()
        text = text[cut:].lstrip()
    if text:
        yield text
