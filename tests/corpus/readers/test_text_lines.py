"""Lines of plain and compressed files."""

from __future__ import annotations

import gzip
import lzma
import pickle

import pytest
import zstandard

from megatron_sas.core.cli import InputError
from megatron_sas.corpus.readers.text_lines import DamagedFile, read_lines


@pytest.mark.parametrize("pack", [(".gz", gzip.compress), (".xz", lzma.compress), (".zst", zstandard.compress)])
def test_compressed_files(tmp_path, pack):
    suffix, compress = pack
    content = "".join(f"line {i} é\n" for i in range(50_000)).encode()
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(compress(content[:1000]) + compress(content[1000:]))
    lines = list(read_lines(path))
    assert "".join(f"{text}\n" for _, text in lines).encode() == content
    assert [number for number, _ in lines] == list(range(1, 50_001))
    path.write_bytes(compress(content)[:-50])
    with pytest.raises(InputError, match="damaged compressed file"):
        list(read_lines(path))
    path.write_bytes(b"this is not compressed at all")
    with pytest.raises(InputError, match="damaged compressed file"):
        list(read_lines(path))


def test_long_lines_come_in_parts_or_are_broken_input(tmp_path):
    long = "ab cd éé " * 40 + "x" * 200 + "é" * 200 + "\n"
    path = tmp_path / "a.txt"
    path.write_text("\ufefffirst\n" + long + "last\n\nend")
    parts = list(read_lines(path, cut_long=True, max_bytes=64))
    assert parts[0] == (1, "first") and parts[-3:] == [(3, "last"), (4, ""), (5, "end")]
    assert {number for number, _ in parts[1:-3]} == {2}
    assert "".join(text for _, text in parts[1:-3]) == long.rstrip("\n")
    assert all(len(text.encode()) <= 64 for _, text in parts)
    with pytest.raises(InputError, match=r"a.txt:2: line longer than 64 bytes"):
        list(read_lines(path, max_bytes=64))
    lines = list(read_lines(path, lambda *_: None, max_bytes=64))
    assert lines == [
        (1, "first"),
        (2, None),
        (3, "last"),
        (4, ""),
        (5, "end"),
    ]


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        list(read_lines(tmp_path / "none.txt"))


def test_damage_survives_the_way_between_processes():
    error = pickle.loads(pickle.dumps(DamagedFile("a.xz: damaged", 0.25)))
    assert (str(error), error.unread) == ("a.xz: damaged", 0.25)
