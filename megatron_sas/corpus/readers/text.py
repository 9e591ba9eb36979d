"""Plain text: a paragraph a line, or on several lines; blank lines separate documents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from megatron_sas.corpus.readers.base import Reader, Reading, Unit
from megatron_sas.corpus.readers.text_lines import DamagedFile, read_lines

_WINDOW_CHARACTERS = 1 << 14  # of a text file, about which it is decided at once whether it is hard-wrapped


def _units(name: str, reading: Reading) -> Iterator[Unit]:
    """A paragraph a line, or several lines (see `Reading.width`); blank lines separate documents."""
    starts, last, width = True, 0, None
    for window, is_rest in _windows(read_lines(name, reading.bad, cut_long=True)):
        numbers, lines = [number for number, _ in window], [line for _, line in window]
        if not is_rest:  # a rest is too little to judge by, and likely to be as what came before
            width = reading.width(lines)
        end = 0
        for paragraph in reading.paragraphs(lines, width):
            starts = starts or paragraph.start > end
            if numbers[paragraph.start] != last:
                reading.skipped.keep(name)
                last = numbers[paragraph.start]
            yield from paragraph.units(starts, f"{name}:{last}", None, reading)
            starts, end = False, paragraph.end
        starts = starts or end < len(lines)


def _windows(lines: Iterable[tuple[int, str | None]]) -> Iterator[tuple[list[tuple[int, str]], bool]]:
    """Numbered lines that could be read, in groups that end at a blank line if they can, and whether these are the rest
    of several groups. What was read before damage comes before its error."""
    window: list[tuple[int, str]] = []
    size, is_first, damage = 0, True, None
    try:
        for number, line in lines:
            if line is None:
                continue
            window.append((number, line))
            size += 1 + len(line)
            if size >= _WINDOW_CHARACTERS and (not line.strip() or size >= 2 * _WINDOW_CHARACTERS):
                yield window, False
                window, size, is_first = [], 0, False
    except DamagedFile as error:
        damage = error
    if window:
        yield window, not is_first
    if damage is not None:
        raise damage


TEXT = Reader(_units, "a paragraph a line, documents separated by blank lines; see --line-breaks")
