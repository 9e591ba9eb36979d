"""Token sequences on disk in the layout of Megatron-LM's IndexedDataset, version 1, so that both can read it.

`PREFIX.bin` holds the tokens of all sequences one after another. `PREFIX.idx`, little-endian:

    9 bytes  b"MMIDIDX\\0\\0"          uint64  version, 1
    uint8    dtype code               uint64  number of sequences n
    uint64   number of document indices d
    int32[n] lengths in tokens        int64[n] byte offsets in PREFIX.bin
    int64[d] sequence index of each document start, and n

Everything this project writes has one sequence per document, so d = n + 1.
"""

from __future__ import annotations

import contextlib
import os
import struct
import tempfile
from array import array
from pathlib import Path

import numpy as np

from megatron_sas.core.cli import InputError
from megatron_sas.core.files import fsync_file, obey_umask

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPE_OF_CODE = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int8),
    3: np.dtype(np.int16),
    4: np.dtype(np.int32),
    5: np.dtype(np.int64),
    6: np.dtype(np.float64),
    7: np.dtype(np.float32),
    8: np.dtype(np.uint16),
}
_CODE_OF_DTYPE = {dtype: code for code, dtype in _DTYPE_OF_CODE.items()}
_BLOCK = 1 << 20  # index entries written at a time: memory stays bounded for any number of sequences


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and int32 that holds every id below `vocab_size`."""
    return np.dtype(np.uint16) if vocab_size <= 1 << 16 else np.dtype(np.int32)


class IndexedDatasetWriter:
    """Write `path_prefix`.bin and .idx; both appear under their names only when `finish` is called.

    Used as a context manager it finishes on success and removes its temporary files when the block raises.
    """

    def __init__(self, path_prefix: str | Path, dtype: np.dtype | type, *, block: int = _BLOCK) -> None:
        self.prefix, self._block = Path(path_prefix), block
        self.dtype = np.dtype(dtype)
        if self.dtype not in _CODE_OF_DTYPE:
            raise ValueError(f"IndexedDataset has no code for dtype {self.dtype}")
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._bin = tempfile.NamedTemporaryFile(  # noqa: SIM115 (closed by finish or abort)
            dir=self.prefix.parent, prefix=f".{self.prefix.name}.bin.", suffix=".tmp", delete=False
        )
        self._lengths = array("i")

    def add(self, sequence: np.ndarray) -> None:
        """Append one sequence (and document): a one-dimensional array of any integer dtype whose values fit `dtype`."""
        sequence = np.asarray(sequence)
        if sequence.ndim != 1:
            raise ValueError(f"a sequence has one dimension, not {sequence.ndim}")
        self._bin.write(np.ascontiguousarray(sequence, dtype=self.dtype.newbyteorder("<")))
        self._lengths.append(len(sequence))

    def finish(self) -> None:
        """Write the index, flush both files to the disk and give them their names, the index last."""
        index_path = self._bin.name.removesuffix(".tmp") + ".idx.tmp"
        try:
            self._bin.flush()
            os.fsync(self._bin.fileno())
            self._bin.close()
            with open(index_path, "wb") as file:
                self._write_index(file)
            fsync_file(index_path)
            for temporary, suffix in ((self._bin.name, ".bin"), (index_path, ".idx")):
                obey_umask(temporary)
                os.replace(temporary, f"{self.prefix}{suffix}")
        except BaseException:
            self.abort()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(index_path)
            raise

    def abort(self) -> None:
        """Remove the temporary file; nothing has appeared under the prefix."""
        self._bin.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._bin.name)

    def _write_index(self, file) -> None:  # noqa: ANN001 (a binary file)
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        count = len(lengths)
        file.write(_HEADER.pack(MAGIC, VERSION, _CODE_OF_DTYPE[self.dtype], count, count + 1))
        for start in range(0, count, self._block):
            file.write(lengths[start : start + self._block].astype("<i4"))
        offset = 0
        for start in range(0, count, self._block):
            sizes = lengths[start : start + self._block].astype(np.int64) * self.dtype.itemsize
            ends = offset + np.cumsum(sizes)
            file.write((ends - sizes).astype("<i8"))
            offset = int(ends[-1])
        for start in range(0, count + 1, self._block):
            file.write(np.arange(start, min(start + self._block, count + 1), dtype="<i8"))

    def __enter__(self) -> IndexedDatasetWriter:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self.finish()
        else:
            self.abort()


class IndexedDataset:
    """Read-only view of `path_prefix`.bin and .idx through memory maps.

    `len(d)` is the number of sequences and `d[i]` a one-dimensional `np.memmap` view of sequence i. Raises `InputError`
    for a wrong magic, version or dtype code, and when either file is shorter than the index says.
    """

    def __init__(self, path_prefix: str | Path) -> None:
        self.prefix = Path(path_prefix)
        index_path, bin_path = Path(f"{path_prefix}.idx"), Path(f"{path_prefix}.bin")
        for path in (index_path, bin_path):
            if not path.is_file():
                raise InputError(f"{path}: no such file; --output of tools/preprocess_data.py is the prefix to give")
        with open(index_path, "rb") as file:
            head = file.read(_HEADER.size)
        if head[: len(MAGIC)] != MAGIC:
            raise InputError(f"{index_path}: not an IndexedDataset index (wrong magic); preprocess the text again")
        if len(head) < _HEADER.size:
            raise InputError(f"{index_path}: shorter than its header; preprocess the text again or copy it anew")
        _, version, code, count, documents = _HEADER.unpack(head)
        if version != VERSION:
            raise InputError(f"{index_path}: index version {version}, this program reads {VERSION}; preprocess again")
        if code not in _DTYPE_OF_CODE:
            raise InputError(f"{index_path}: unknown dtype code {code}; preprocess the text again")
        self.dtype = _DTYPE_OF_CODE[code]
        expected = _HEADER.size + 12 * count + 8 * documents
        if index_path.stat().st_size < expected:
            raise InputError(
                f"{index_path}: {index_path.stat().st_size} bytes where its header says {expected}; "
                "the file is cut off: copy it anew or preprocess again"
            )
        buffer = np.memmap(index_path, dtype=np.uint8, mode="r")
        cut = np.cumsum([_HEADER.size, 4 * count, 8 * count, 8 * documents])
        self.sequence_lengths: np.ndarray = buffer[cut[0] : cut[1]].view("<i4")
        self.sequence_pointers: np.ndarray = buffer[cut[1] : cut[2]].view("<i8")
        self.document_indices: np.ndarray = buffer[cut[2] : cut[3]].view("<i8")
        ends = self.sequence_pointers + self.sequence_lengths * np.int64(self.dtype.itemsize)
        needed = int(ends.max(initial=0))
        if count and (int(self.sequence_lengths.min()) < 0 or int(self.sequence_pointers.min()) < 0):
            raise InputError(f"{index_path}: negative length or offset; the file is damaged: preprocess again")
        if bin_path.stat().st_size < needed:
            raise InputError(
                f"{bin_path}: {bin_path.stat().st_size} bytes where {index_path.name} needs {needed}; "
                "the file is cut off: copy it anew or preprocess again"
            )
        # An empty file cannot be mapped.
        self._bytes = np.memmap(bin_path, dtype=np.uint8, mode="r") if needed else np.zeros(0, np.uint8)

    def __len__(self) -> int:
        return len(self.sequence_lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        start = int(self.sequence_pointers[index])
        size = int(self.sequence_lengths[index]) * self.dtype.itemsize
        return self._bytes[start : start + size].view(self.dtype.newbyteorder("<"))
