"""JSON lines: one document a line."""

from __future__ import annotations

import json
from collections.abc import Iterator

from megatron_sas.corpus.readers.base import Reader, Reading, Unit, record_units
from megatron_sas.corpus.readers.text_lines import read_lines


def _units(name: str, reading: Reading) -> Iterator[Unit]:
    """One document a line, an object whose text field holds paragraphs on lines of their own."""
    for number, line in read_lines(name, reading.bad):
        if line is None or not line.strip():
            continue
        where = f"{name}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reading.bad(where, f"invalid JSON ({error})")
            continue
        yield from record_units(record, where, reading)


JSON_LINES = Reader(_units, "a document a line, its paragraphs separated by newlines; see --line-breaks")
