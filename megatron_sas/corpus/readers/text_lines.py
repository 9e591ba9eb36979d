"""Lines of plain or compressed files with their numbers."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, NoReturn

from megatron_sas.core.cli import InputError

OnError = Literal["refuse", "skip"] | None  # of a tool's --on-error; None refuses in a tool without that option
# Takes where input is broken ("file:line") and the reason: raises, or returns for the input to be left out.
Bad = Callable[[str, str], None]

MAX_LINE_BYTES = 1 << 26  # no more of a line is in memory at once


def refuse(where: str, reason: str, remedy: str = "correct it") -> NoReturn:
    """Raise `InputError` for broken input."""
    raise InputError(f"{where}: {reason}; {remedy}")


def parse_json(text: str, where: str) -> Any:
    """A JSON value; `InputError` naming the place for what is none, or nested too deeply."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        at = isinstance(error, json.JSONDecodeError)
        reason = f"{error.msg} at character {error.pos}" if at else str(error)
        raise InputError(f"{where}: not JSON ({reason}); repair or remove it") from None


def is_encodable(text: str) -> bool:
    """Whether it has no half of a surrogate pair, as JSON may have and file names in other encodings."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def check_file_name(name: str | Path) -> None:
    """Refuse a name that headers and reports cannot hold (`InputError`)."""
    if not is_encodable(str(name)):
        raise InputError(f"{name}: the name is not UTF-8; rename it")


class DamagedFile(InputError):
    """A compressed file cannot be read to its end. `unread`: the share that is not read, 1 when nobody can know."""

    def __init__(self, message: str, unread: float = 1.0) -> None:  # unpickled with the message alone, then filled
        super().__init__(message)
        self.unread = unread


class _ZstdReader(io.RawIOBase):
    """Decompressed bytes of a .zst file; unlike zstandard's own reader it notices that the file is cut off."""

    def __init__(self, file: BinaryIO) -> None:
        import zstandard  # only here: few inputs need it

        self._file, self._new = file, zstandard.ZstdDecompressor().decompressobj
        self._frame, self._ready, self._error = None, b"", zstandard.ZstdError

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:
        while not self._ready:
            left_over = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
            data = left_over or self._file.read(1 << 16)
            if not data:
                if self._frame is not None and not self._frame.eof:
                    raise EOFError("the last frame is not complete")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = self._new()
            try:
                self._ready = self._frame.decompress(data)
            except self._error as error:
                raise EOFError(str(error)) from error
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size


# What opens the decompressed bytes of an open file, by the suffix that follows that of the content.
COMPRESSED: dict[str, Callable[[BinaryIO], BinaryIO]] = {
    ".gz": gzip.open,
    ".xz": lzma.open,
    ".zst": lambda file: io.BufferedReader(_ZstdReader(file), 1 << 16),
}


def without_compression(name: str | Path) -> Path:
    """A file's name without the suffix of its compression: the suffix left tells the kind of content."""
    path = Path(name)
    return path.with_suffix("") if path.suffix in COMPRESSED else path


@contextlib.contextmanager
def open_binary(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file for reading bytes, decompressing `COMPRESSED` ones; damaged data becomes a `DamagedFile`."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file; check its name")
    with open(path, "rb") as raw, COMPRESSED.get(path.suffix, contextlib.nullcontext)(raw) as file:
        try:
            if path.suffix in COMPRESSED and not path.stat().st_size:
                raise EOFError("it is empty, without even a header")  # which not all of the readers notice
            yield file
        except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
            size, read = path.stat().st_size, raw.tell()
            unread = 1 - read / size if read < size else 1.0  # at its end: cut off, nobody knows how much
            raise DamagedFile(f"{path}: damaged compressed file ({error}); fetch it again", unread) from error


def read_lines(
    path: str | Path, bad: Bad = refuse, *, cut_long: bool = False, max_bytes: int = MAX_LINE_BYTES
) -> Iterator[tuple[int, str | None]]:
    """Yield (line number from 1, text without line end) of a UTF-8 file; the text is None where a skipped line stood.

    A line longer than `max_bytes` is broken input, unless `cut_long`: then it comes in several parts of the same
    number, cut after a space where there is one. A byte order mark at the beginning is dropped.
    """
    with open_binary(path) as file:
        number, rest, complete = 0, b"", True  # complete: the previous line was read to its end
        while line := rest + file.readline(max_bytes - len(rest)):
            number += complete
            rest, complete = b"", line.endswith(b"\n") or len(line) < max_bytes
            if not complete and cut_long:
                cut = line.rfind(b" ") + 1
                if cut <= max_bytes // 2:  # else the parts could become arbitrarily small
                    cut = _last_character(line)
                line, rest = line[:cut], line[cut:]
            elif not complete:
                while not complete:
                    complete = (part := file.readline(max_bytes)).endswith(b"\n") or not part
                bad(f"{path}:{number}", f"line longer than {max_bytes} bytes")
                yield number, None
                continue
            if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                line = line[3:]
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                bad(f"{path}:{number}", f"invalid UTF-8 at byte {error.start + 1}")
                yield number, None
                continue
            yield number, text.rstrip("\r\n")


def _last_character(line: bytes) -> int:
    """Index of the last byte that begins a character: a cut there splits none."""
    index = len(line) - 1
    while index > len(line) - 4 and line[index] & 0xC0 == 0x80:
        index -= 1
    return index
