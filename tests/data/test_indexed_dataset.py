"""The IndexedDataset layout, checked byte by byte with struct."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from megatron_sas.core.cli import InputError
from megatron_sas.data.indexed_dataset import IndexedDataset, token_dtype, write_index

SEQUENCES = [[5, 6, 7], [], [65535], [1, 2]]


def write(prefix, dtype=np.uint16, sequences=SEQUENCES, **options):
    prefix.with_name(f"{prefix.name}.bin").write_bytes(np.concatenate(sequences).astype(dtype).tobytes())
    write_index(f"{prefix}.idx", dtype, np.array([len(sequence) for sequence in sequences]), **options)


def test_layout_byte_by_byte(tmp_path):
    write(tmp_path / "a")
    tokens = [token for sequence in SEQUENCES for token in sequence]
    assert (tmp_path / "a.bin").read_bytes() == struct.pack(f"<{len(tokens)}H", *tokens)
    expected = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", 8) + struct.pack("<QQ", 4, 5)
    expected += struct.pack("<4i", 3, 0, 1, 2) + struct.pack("<4q", 0, 6, 6, 8) + struct.pack("<5q", 0, 1, 2, 3, 4)
    assert (tmp_path / "a.idx").read_bytes() == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


@pytest.mark.parametrize(
    ("dtype", "code"),
    [
        (np.uint8, 1),
        (np.int8, 2),
        (np.int16, 3),
        (np.int32, 4),
        (np.int64, 5),
        (np.float64, 6),
        (np.float32, 7),
        (np.uint16, 8),
    ],
)
def test_every_dtype_reads_back(tmp_path, dtype, code):
    sequences = [[1, 2, 3], [4], [100, 101]]
    write(tmp_path / "a", dtype, sequences)
    assert (tmp_path / "a.idx").read_bytes()[17] == code
    data = IndexedDataset(tmp_path / "a")
    assert data.dtype == dtype and len(data) == 3
    assert isinstance(data[0], np.memmap)
    assert [list(data[i]) for i in range(3)] == sequences and list(data[-1]) == [100, 101]
    assert list(data.sequence_lengths) == [3, 1, 2]
    assert list(data.document_indices) == [0, 1, 2, 3]
    with pytest.raises(IndexError):
        data[3]


def test_index_blocks_agree(tmp_path):
    sequences = [[0] * (i % 5) for i in range(50)]
    write(tmp_path / "a", sequences=sequences)
    write(tmp_path / "b", sequences=sequences, block=7)
    assert (tmp_path / "a.idx").read_bytes() == (tmp_path / "b.idx").read_bytes()


def test_a_dtype_without_a_code_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no code for dtype complex128"):
        write_index(tmp_path / "a.idx", np.complex128, np.ones(3, int))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("suffix", "change", "message"),
    [
        (".idx", lambda b: b"XMIDIDX\x00\x00" + b[9:], "wrong magic"),
        (".idx", lambda b: b"", "wrong magic"),
        (".idx", lambda b: b[:9] + struct.pack("<Q", 2) + b[17:], "index version 2"),
        (".idx", lambda b: b[:17] + b"\x63" + b[18:], "unknown dtype code 99"),
        (".idx", lambda b: b[:20], "shorter than its header"),
        (".idx", lambda b: b[:-1], "its header says"),
        (".idx", lambda b: b[:34] + struct.pack("<i", -3) + b[38:], "negative"),
        (".bin", lambda b: b[:-1], "the file is cut off"),
    ],
)
def test_damaged_files(tmp_path, suffix, change, message):
    write(tmp_path / "a")
    path = tmp_path / f"a{suffix}"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(InputError, match=message) as error:
        IndexedDataset(tmp_path / "a")
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
def test_missing_files(tmp_path, suffix):
    write(tmp_path / "a")
    (tmp_path / f"a{suffix}").unlink()
    with pytest.raises(InputError, match=rf"a{suffix}: no such file"):
        IndexedDataset(tmp_path / "a")


def test_token_dtype():
    assert token_dtype(65536) == np.uint16 and token_dtype(65537) == np.int32


class MinimalReader:
    """Another reader, from the format's description alone; it asserts what Megatron-LM's own does."""

    DTYPES = (None, np.uint8, np.int8, np.int16, np.int32, np.int64, np.float64, np.float32, np.uint16)

    def __init__(self, prefix):
        index = (prefix.parent / f"{prefix.name}.idx").read_bytes()
        assert index[:9] == b"MMIDIDX\x00\x00" and struct.unpack_from("<Q", index, 9) == (1,)
        (code,), (sequences, documents) = struct.unpack_from("<B", index, 17), struct.unpack_from("<QQ", index, 18)
        self.dtype = np.dtype(self.DTYPES[code])
        self.lengths = np.frombuffer(index, "<i4", sequences, 34)
        self.pointers = np.frombuffer(index, "<i8", sequences, 34 + 4 * sequences)
        self.documents = np.frombuffer(index, "<i8", documents, 34 + 12 * sequences)
        assert len(self.lengths) == self.documents[-1] and self.documents[0] == 0
        self.tokens = (prefix.parent / f"{prefix.name}.bin").read_bytes()

    def __getitem__(self, number):
        return np.frombuffer(self.tokens, self.dtype, self.lengths[number], self.pointers[number])


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_another_reader_reads_ours(tmp_path, dtype):
    write(tmp_path / "a", dtype)
    reader = MinimalReader(tmp_path / "a")
    assert reader.dtype == dtype and list(reader.documents) == [0, 1, 2, 3, 4]
    assert [reader[number].tolist() for number in range(4)] == SEQUENCES


@pytest.mark.parametrize("modes", [b"", bytes(6)])
def test_we_read_files_of_several_sequences_a_document(tmp_path, modes):
    """As Megatron-LM writes them for sentences: documents of 2, 0, 1 and 3 sequences; multimodal files end in modes."""
    sequences = [[1, 2, 3], [4], [5, 6], [7], [8, 9, 10], [11]]
    documents, lengths = [0, 2, 2, 3, 6], [len(sequence) for sequence in sequences]
    pointers = [4 * sum(lengths[:number]) for number in range(6)]
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, 6, 5)
    index += struct.pack("<6i", *lengths) + struct.pack("<6q", *pointers) + struct.pack("<5q", *documents) + modes
    (tmp_path / "theirs.idx").write_bytes(index)
    (tmp_path / "theirs.bin").write_bytes(np.concatenate(sequences).astype("<i4").tobytes())
    data = IndexedDataset(tmp_path / "theirs")
    assert data.dtype == np.int32 and [data[number].tolist() for number in range(6)] == sequences
    assert data.document_indices.tolist() == documents
    assert [MinimalReader(tmp_path / "theirs")[number].tolist() for number in range(6)] == sequences
