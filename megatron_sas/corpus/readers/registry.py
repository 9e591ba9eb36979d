"""The readers by suffix and by scheme. A new one is a module of this package and a line here."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from megatron_sas.core.cli import InputError
from megatron_sas.corpus.readers.base import Reader, Reading, Unit
from megatron_sas.corpus.readers.conllu import CONLLU
from megatron_sas.corpus.readers.hub import HUB
from megatron_sas.corpus.readers.json_lines import JSON_LINES
from megatron_sas.corpus.readers.text import TEXT
from megatron_sas.corpus.readers.text_lines import COMPRESSED, DamagedFile, check_file_name, without_compression

READERS_BY_SUFFIX: dict[str, Reader] = {
    ".txt": TEXT,
    ".jsonl": JSON_LINES,
    ".conllu": CONLLU,
}
READERS_BY_SCHEME: dict[str, Reader] = {  # by what the name begins with
    "hf:": HUB,
}


def find_reader(name: str) -> Reader | None:
    """The reader of an input by its name alone; None for an unknown suffix."""
    schemes = (reader for scheme, reader in READERS_BY_SCHEME.items() if name.startswith(scheme))
    return next(schemes, READERS_BY_SUFFIX.get(without_compression(name).suffix))


def reader_of(name: str) -> Reader:
    """The reader of an input; `InputError` for an unknown kind, a missing file, or a name that is wrong in itself."""
    check_file_name(name)
    reader = find_reader(name)
    if reader is None:
        schemes = "".join(
            f" or {scheme}{reader.remark.partition(',')[0]}" for scheme, reader in READERS_BY_SCHEME.items()
        )
        raise InputError(
            f"{name}: unknown input; give {', '.join(READERS_BY_SUFFIX)} (also {', '.join(COMPRESSED)}){schemes}"
        )
    reader.check(name)
    return reader


def input_usage() -> str:
    """What can be an input, for --help."""
    suffixes = [
        f"{suffix} ({reader.remark})" if reader.remark else suffix for suffix, reader in READERS_BY_SUFFIX.items()
    ]
    schemes = [scheme + reader.remark for scheme, reader in READERS_BY_SCHEME.items()]
    return f"{', '.join(suffixes)}; each also {', '.join(COMPRESSED)}; or {' or '.join(schemes)}"


def source_name(name: str) -> str:
    """What an input is called in headers and reports: a file without its folder, a dataset in full."""
    return (find_reader(name) or TEXT).label(name)


def repeated_name(names: Iterable[str]) -> str | None:
    """The first name that occurs more than once."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def dataset_of(label: str) -> str | None:
    """The dataset that an input is a part of, by its label (`source_name`); None if it is no part of one."""
    reader = find_reader(label)
    return reader and reader.dataset(label)


def input_files(inputs: list[str]) -> list[dict[str, Any]]:
    """Of every input its `name` (`source_name`) and what tells it from others of that name (`Reader.version`)."""
    return [{"name": source_name(name), **reader_of(name).version(name)} for name in inputs]


def read_units(inputs: list[str], reading: Reading) -> Iterator[Unit]:
    """Yield the units of all inputs in order; every input begins a new document.

    Raises:
        InputError: broken input (unless it is skipped), or more of it in one input than `reading.skipped` allows.
    """
    for name in inputs:
        unit, joined = None, reading.counts["lines_joined"]
        try:
            units = reader_of(name).units(name, reading)
            if reading.rows_per_document is not None:
                units = _grouped(units, reading.rows_per_document)
            for unit in units:
                yield unit
        except DamagedFile as error:
            if reading.on_error != "skip":
                raise
            place = "the beginning" if unit is None else f"line {unit.where.rpartition(':')[2]}"
            reason = str(error).removeprefix(f"{name}: ")
            reading.skipped.skip(f"{name}:end", f"{reason}; nothing is read after {place}", unread=error.unread)
        joined = reading.counts["lines_joined"] - joined
        if joined and reading.line_breaks == "auto" and reading.skipped.show:
            print(
                f"{name}: looks hard-wrapped: {joined:,} lines are joined to the line before them; --line-breaks "
                "paragraph keeps them apart",
                file=sys.stderr,
            )
        reading.skipped.check(name)


def _grouped(units: Iterable[Unit], rows: int) -> Iterator[Unit]:
    """The units of an input with a new document every `rows` records that could be read, and nowhere else."""
    number, last = 0, ""
    for unit in units:
        unit.starts_document = unit.where != last and number % rows == 0
        number += unit.where != last
        last = unit.where
        if unit.starts_document or unit.content is not None:
            yield unit
