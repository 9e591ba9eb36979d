"""Damage is found where it is read, wherever it lies and however rows are indexed; what is whole stays readable."""

from __future__ import annotations

import json
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sas.core.cli import InputError
from megatron_sas.data.checksums import CheckedMap, describe_file
from megatron_sas.data.loader import PrefetchLoader
from megatron_sas.data.mlm_dataset import MLMDataset
from megatron_sas.data.packed import PackedData

ROWS, COLUMNS, BLOCK = 23, 10, 64  # rows of 20 bytes: a block holds parts of four or five


@pytest.fixture(scope="module")
def numbers():
    return np.random.default_rng(0).integers(0, 60000, (ROWS, COLUMNS)).astype("<u2")


def open_map(path, record):
    return CheckedMap(str(path), "<u2", (ROWS, COLUMNS), record)


def test_the_record(tmp_path, numbers):
    numbers.tofile(tmp_path / "x")
    record = describe_file(tmp_path / "x", BLOCK)
    content = (tmp_path / "x").read_bytes()
    assert record["size"] == len(content) == 460 and record["block_size"] == BLOCK
    parts = [content[start : start + BLOCK] for start in range(0, 460, BLOCK)]
    assert record["crc32"] == "".join(f"{zlib.crc32(part):08x}" for part in parts)


INDICES = st.one_of(
    st.integers(-ROWS, ROWS - 1),
    st.slices(ROWS),
    st.lists(st.integers(-ROWS, ROWS - 1), min_size=1, max_size=8).map(np.array),
    st.lists(st.booleans(), min_size=ROWS, max_size=ROWS).map(np.array),
    st.tuples(st.integers(0, ROWS - 1), st.integers(0, COLUMNS - 1)),
    st.just((slice(None), slice(None))),
    st.just(Ellipsis),
)


@settings(max_examples=300, deadline=None)
@given(index=INDICES, damaged=st.integers(0, 459))
def test_an_index_fails_exactly_when_its_blocks_are_damaged(tmp_path_factory, numbers, index, damaged):
    path = tmp_path_factory.getbasetemp() / "damaged"
    numbers.tofile(path)
    record = describe_file(path, BLOCK)
    assert np.array_equal(open_map(path, record)[index], numbers[index])
    content = bytearray(path.read_bytes())
    content[damaged] ^= 4
    path.write_bytes(content)
    rows = np.arange(ROWS)[index[0] if isinstance(index, tuple) else index]
    touched = {byte // BLOCK for row in np.atleast_1d(rows) for byte in (row * 20, row * 20 + 19)}
    mapped = open_map(path, record)
    if damaged // BLOCK in touched:
        start = damaged // BLOCK * BLOCK
        with pytest.raises(InputError, match=rf"damaged: bytes {start} to {min(start + BLOCK, 460)} do not match"):
            mapped[index]
    else:
        assert np.array_equal(mapped[index], numbers[index])


def test_a_block_is_compared_when_it_is_first_read_and_not_again(tmp_path, numbers):
    numbers.tofile(tmp_path / "x")
    mapped = open_map(tmp_path / "x", describe_file(tmp_path / "x", BLOCK))
    for row in range(ROWS - 4):
        assert type(mapped[np.array([row])]) is np.ndarray
    np.memmap(tmp_path / "x", np.uint8, "r+")[:] ^= 1  # shows in the map
    for row in range(ROWS - 8):
        assert np.array_equal(mapped[row].view(np.uint8), numbers[row].view(np.uint8) ^ 1)
    with pytest.raises(InputError, match="bytes 384 to 448 do not match"):
        mapped[ROWS - 1]


def test_indices_that_numpy_refuses(tmp_path, numbers):
    numbers.tofile(tmp_path / "x")
    mapped = open_map(tmp_path / "x", describe_file(tmp_path / "x", BLOCK))
    for index in (ROWS, -ROWS - 1, np.array([0, ROWS])):
        with pytest.raises(IndexError):
            mapped[index]


def test_records_that_do_not_fit(tmp_path, numbers):
    numbers.tofile(tmp_path / "x")
    record = describe_file(tmp_path / "x", BLOCK)
    for change in ({"crc32": record["crc32"][:-8]}, {"block_size": BLOCK * 2}, {"crc32": "zz"}, {"block_size": None}):
        with pytest.raises(InputError, match=r"x: its header's block checksums are"):
            open_map(tmp_path / "x", record | change)
    assert np.array_equal(open_map(tmp_path / "x", {"size": 460})[3], numbers[3]), "data of earlier versions"


def with_checksums(prefix):
    path = prefix.with_name(f"{prefix.name}.json")
    header = json.loads(path.read_text())
    header["files"] = {name: describe_file(f"{prefix}.{name}", BLOCK) for name in header["files"]}
    path.write_text(json.dumps(header))
    return prefix


def test_training_stops_at_the_damaged_sequence_and_not_before(make_packed):
    prefix = with_checksums(make_packed(n=64, s=32))  # a sequence a block
    path = prefix.with_name("packed.heads.bin")
    content = bytearray(path.read_bytes())
    content[17 * 64 + 5] ^= 1  # sequence 17
    path.write_bytes(content)
    settings = {"seed": 3, "mask_prob": 0.15, "global_batch_size": 4, "micro_batch_size": 4, "rank": 0, "world_size": 1}
    data = MLMDataset(PackedData(prefix), **settings)
    with (
        pytest.raises(InputError, match=r"packed.heads.bin: bytes 1,088 to 1,152"),
        PrefetchLoader(data, 0, 16) as loader,
    ):
        seen = []
        for window in loader:
            seen += window.micro_batches[0].sample_ids.tolist()
    assert 17 not in seen and len(seen) < 64
    step = len(seen) // 4
    healthy = [s for s in range(16) if s != step]
    assert sum(len(data.window(s).micro_batches[0].sample_ids) for s in healthy) == 60


def test_control_heads_are_checked_too(make_packed):
    prefix = with_checksums(make_packed(n=8, s=32))
    np.full((8, 32), -1, "<i2").tofile(f"{prefix}.heads-none.bin")
    record = describe_file(f"{prefix}.heads-none.bin", BLOCK)
    header = {"base_fingerprint": PackedData(prefix).fingerprint, **record}
    prefix.with_name("packed.heads-none.json").write_text(json.dumps(header))
    assert (PackedData(prefix, "none").heads[2] == -1).all()
    np.memmap(f"{prefix}.heads-none.bin", np.uint8, "r+")[70] = 0
    with pytest.raises(InputError, match=r"heads-none.bin: bytes 64 to 128"):
        PackedData(prefix, "none").heads[1]
