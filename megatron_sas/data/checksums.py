"""Checksums per block, so that damage is found where it is read, at the cost of reading every block once a process.

CRC-32 of blocks of 256 KiB runs at several GB/s. It finds accidents; the SHA-256 of whole files in the same headers
identifies data.

Every process compares the blocks that it touches itself. One alone reads all rows of a block: a twentieth of its work,
in the first epoch only. Of R processes each reads one row in R, but still nearly every block in an epoch, until R
reaches the rows of a block (256 of 512 tokens); then each row first costs a block of each stream, for several epochs.
Smaller blocks would lower that, but cost more with few processes, and lengthen the headers.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sas.core.cli import InputError
from megatron_sas.core.files import sha256_file

BLOCK = 1 << 18  # bytes


def describe_file(path: str | Path, block_size: int = BLOCK) -> dict[str, Any]:
    """What a header records of a file: `size`, `sha256`, and `block_checksums`."""
    return {"size": Path(path).stat().st_size, "sha256": sha256_file(path), **block_checksums(path, block_size)}


def block_checksums(path: str | Path, block_size: int = BLOCK) -> dict[str, Any]:
    """`block_size` in bytes and `crc32`, eight hexadecimal digits a block."""
    sums = []
    with open(path, "rb") as file:
        while block := file.read(block_size):
            sums.append(f"{zlib.crc32(block):08x}")
    return {"block_size": block_size, "crc32": "".join(sums)}


class CheckedMap(np.memmap):
    """A read-only memory map (N, S) whose rows are compared with their blocks' checksums when they are first indexed.

    `map[rows]` and `map[rows, …]` check and give plain arrays; operations on the map as a whole do not check. Without
    recorded checksums (data of earlier versions) nothing is checked.

    Args:
        record: the file's entry in a header, with `block_size` and `crc32` or without both.

    Raises:
        InputError: at once when the record does not fit the file; by indexing, for a damaged block.
    """

    def __new__(cls, path: str, dtype: np.dtype | str, shape: tuple[int, int], record: dict[str, Any]) -> CheckedMap:
        result = super().__new__(cls, path, dtype=dtype, mode="r", shape=shape)
        if "crc32" in record:
            result._blocks = _Blocks(path, result.view(np.ndarray), record)
        return result

    def __array_finalize__(self, other: np.ndarray | None) -> None:
        super().__array_finalize__(other)
        self._blocks: _Blocks | None = None  # a view of a map does not check

    def __getitem__(self, index: Any) -> Any:
        if self._blocks is not None:
            self._blocks.check(index[0] if isinstance(index, tuple) and index else index)
        result = super().__getitem__(index)
        return result.view(np.ndarray) if isinstance(result, np.ndarray) else result


class _Blocks:
    """The checksums of a mapped file and which of its blocks have been compared."""

    def __init__(self, path: str, data: np.ndarray, record: dict[str, Any]) -> None:
        self._path, self._rows, self._row_bytes = path, len(data), data.nbytes // len(data)
        self._bytes = data.reshape(-1).view(np.uint8)
        try:
            self._size = int(record["block_size"])
            self._sums = np.frombuffer(bytes.fromhex(record["crc32"]), dtype=">u4")
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{path}: its header's block checksums are malformed ({error}); preprocess again"
            ) from None
        if self._size < 1 or len(self._sums) != -(-len(self._bytes) // self._size):
            raise InputError(f"{path}: its header's block checksums are of another file; preprocess again")
        self._pending = np.ones(len(self._sums), dtype=bool)

    def check(self, index: Any) -> None:
        """Compare the blocks under rows `index` (anything that numpy takes for one axis) that were not compared yet."""
        if not self._pending.any():
            return
        if index is Ellipsis or index is None:
            index = slice(None)
        start, stop, step = index.indices(self._rows) if isinstance(index, slice) else (0, 0, 0)
        if step == 1 and start < stop:
            blocks = np.arange(start * self._row_bytes // self._size, -(-stop * self._row_bytes // self._size))
        else:
            rows = np.arange(start, stop, step) if step else np.asarray(index)
            rows = np.flatnonzero(rows) if rows.dtype == bool else np.unique(rows)
            rows = np.where(rows < 0, rows + self._rows, rows)
            rows = rows[(rows >= 0) & (rows < self._rows)]  # numpy itself refuses the others
            first, last = rows * self._row_bytes // self._size, ((rows + 1) * self._row_bytes - 1) // self._size
            span = np.arange(int((last - first).max(initial=0)) + 1)
            blocks = np.unique(np.minimum(first[:, None] + span, last[:, None]))
        for block in blocks[self._pending[blocks]].tolist():
            start = block * self._size
            if zlib.crc32(self._bytes[start : start + self._size]) != self._sums[block]:
                end = min(start + self._size, len(self._bytes))
                raise InputError(
                    f"{self._path}: bytes {start:,} to {end:,} do not match their checksum; the file is damaged: copy "
                    "it anew or preprocess again"
                )
            self._pending[block] = False
