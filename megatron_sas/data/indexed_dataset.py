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

import struct
from pathlib import Path

import numpy as np

from megatron_sas.core.cli import InputError
from megatron_sas.core.files import fsync_file

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
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<i4")


def write_index(path: str | Path, dtype: np.dtype | type, lengths: np.ndarray, *, block: int = _BLOCK) -> None:
    """Write the index of sequences with these `lengths` (n,) in tokens, one a document, and flush it to the disk."""
    dtype, lengths, count = np.dtype(dtype), np.asarray(lengths), len(lengths)
    if dtype not in _CODE_OF_DTYPE:
        raise ValueError(f"IndexedDataset has no code for dtype {dtype}")
    with open(path, "wb") as file:
        file.write(_HEADER.pack(MAGIC, VERSION, _CODE_OF_DTYPE[dtype], count, count + 1))
        for start in range(0, count, block):
            file.write(lengths[start : start + block].astype("<i4"))
        offset = 0
        for start in range(0, count, block):
            sizes = lengths[start : start + block].astype(np.int64) * dtype.itemsize
            ends = offset + np.cumsum(sizes)
            file.write((ends - sizes).astype("<i8"))
            offset = int(ends[-1])
        for start in range(0, count + 1, block):
            file.write(np.arange(start, min(start + block, count + 1), dtype="<i8"))
    fsync_file(path)


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
