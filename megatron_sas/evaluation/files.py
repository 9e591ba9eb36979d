"""Text files that evaluations read as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_sas.core.cli import InputError


def read_text(path: Path) -> str:
    """A UTF-8 file without its byte order mark. Raises `InputError` when it is something else."""
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}; convert the file") from None


def numbered_lines(path: Path, text: str) -> Iterator[tuple[str, str]]:
    """(line, "PATH:NUMBER") of the lines of a file that are not blank."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield line.rstrip("\r"), f"{path}:{number}"
