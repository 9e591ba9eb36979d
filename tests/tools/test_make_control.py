"""The tool that writes control heads beside packed data, as a user runs it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from tool_calls import run_tool

from megatron_sas.core.cli import InputError
from megatron_sas.corpus.controls import parse_control
from megatron_sas.data.indexed_dataset import write_index
from megatron_sas.data.packed import FILES, FORMAT, FORMAT_VERSION, PackedData

N, S = 300, 16


def write_packed(prefix: Path) -> None:
    """Packed data of two sentences of seven words a sequence, with heads drawn at random but acyclic."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 50, (N, S)).astype(np.uint16)
    boundaries = np.zeros((N, S), np.uint8)
    boundaries[:, 1:15] = 1
    boundaries[:, [1, 8]] = 3
    heads = np.full((N, S), -1, np.int16)
    for row in range(N):
        for start in (1, 8):
            order = start + rng.permutation(7)
            for rank in range(1, 7):
                heads[row, order[rank]] = order[rng.integers(rank)]
    tokens.tofile(f"{prefix}.bin")
    write_index(f"{prefix}.idx", np.uint16, np.full(N, S))
    for name, stream in (("heads", heads), ("marks", boundaries), ("relns", (heads >= 0).astype(np.uint8))):
        Path(f"{prefix}.{name}.bin").write_bytes(stream.tobytes())
    files = {}
    for name in FILES:
        content = Path(f"{prefix}.{name}").read_bytes()
        files[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    ids = {"pad_id": 0, "unk_id": 1, "cls_id": 2, "sep_id": 3, "mask_id": 4}
    header = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "seq_length": S,
        "num_sequences": N,
        "relations": ["", "dep"],
        "tokenizer": {"path": "vocab.txt", "hash": "0", "vocab_size": 50, **ids},
        "files": files,
    }
    Path(f"{prefix}.json").write_text(json.dumps(header))


@pytest.fixture
def prefix(tmp_path) -> Path:
    write_packed(tmp_path / "toy")
    return tmp_path / "toy"


@pytest.fixture
def run(capsys):
    return partial(run_tool, capsys, "make_control")


@pytest.mark.parametrize(
    ("kind", "name"), [("permuted", "permuted"), ("random_tree", "random_tree"), ("offset:-2", "offset--2")]
)
def test_stream_and_header(run, prefix, kind, name):
    result = run("--data", prefix, "--control", kind, "--seed", 3)
    assert result.returncode == 0, result.stderr
    packed = PackedData(prefix, heads_name=name)
    packed.verify()
    base = PackedData(prefix)
    expected = parse_control(kind)(np.asarray(base.heads), np.asarray(base.boundaries), 3, np.arange(N))
    np.testing.assert_array_equal(packed.heads, expected)
    header = packed.heads_header
    assert (header["kind"], header["seed"], header["name"]) == (kind, 3, name)
    assert header["edges"] == np.count_nonzero(expected >= 0)
    assert header["base_edges"] == np.count_nonzero(base.heads >= 0)


def test_block_size_does_not_matter(prefix, tmp_path):
    import make_control

    packed = PackedData(prefix)
    make_control.write_heads(packed, parse_control("random_tree"), 0, tmp_path / "whole")
    make_control.write_heads(packed, parse_control("random_tree"), 0, tmp_path / "blocks", 7 * S)
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "blocks").read_bytes()


def test_name_and_overwrite(run, prefix, tmp_path):
    arguments = ("--data", prefix, "--control", "permuted", "--name", "mine")
    assert run(*arguments).returncode == 0
    before = Path(f"{prefix}.heads-mine.bin").read_bytes()
    refused = run(*arguments, "--seed", 1)
    assert refused.returncode == 2 and "--overwrite" in refused.stderr
    assert Path(f"{prefix}.heads-mine.bin").read_bytes() == before
    assert run(*arguments, "--seed", 1, "--overwrite").returncode == 0
    assert Path(f"{prefix}.heads-mine.bin").read_bytes() != before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_an_error_at_the_very_end_leaves_the_old_stream(prefix):
    """The disk that is full when the header is written."""
    from make_control import make_control

    make_control(str(prefix), "permuted", 0)
    files = [Path(f"{prefix}.heads-permuted.{end}") for end in ("bin", "json")]
    before = [path.read_bytes() for path in files]

    def full(*_):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        make_control(str(prefix), "permuted", 1, overwrite=True, write_header=full)
    assert [path.read_bytes() for path in files] == before


def test_what_a_killed_process_left_is_removed(run, prefix, tmp_path):
    left = tmp_path / ".toy.heads-permuted.bin.abcdefgh.tmp"
    left.mkdir()
    (left / "owner").write_text(socket.gethostname())  # not locked: the owner is gone
    (left / "toy.heads-permuted.bin").write_bytes(b"half")
    assert run("--data", prefix, "--control", "permuted").returncode == 0
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    modes = [os.stat(f"{prefix}.{name}.bin").st_mode for name in ("heads", "heads-permuted")]
    assert modes[0] == modes[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--control", "syntax"), "random_tree"),
        (("--control", "permuted", "--name", "a/b"), "--name"),
        (("--control", "permuted", "--data", "nowhere"), "nowhere.json"),
    ],
)
def test_bad_arguments(run, prefix, arguments, message):
    result = run("--data", prefix, *arguments)
    assert result.returncode == 2 and message in result.stderr and result.stderr.count("\n") == 1


def test_inconsistent_heads(run, prefix, tmp_path):
    heads = np.fromfile(f"{prefix}.heads.bin", "<i2").reshape(N, S)
    heads[5, 2] = 9  # a word of the other sentence
    heads.tofile(f"{prefix}.heads.bin")
    before = sorted(path.name for path in tmp_path.iterdir())
    result = run("--data", prefix, "--control", "permuted")
    assert result.returncode == 2 and "same sentence" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_other_tokens_are_noticed(run, prefix, tmp_path):
    assert run("--data", prefix, "--control", "permuted").returncode == 0
    for suffix in ("bin", "json"):
        shutil.copy(f"{prefix}.heads-permuted.{suffix}", tmp_path / f"kept.{suffix}")
    header = json.loads(Path(f"{prefix}.json").read_text())
    header["files"]["bin"]["sha256"] = "0" * 64
    Path(f"{prefix}.json").write_text(json.dumps(header))
    with pytest.raises(InputError, match="other tokens"):
        PackedData(prefix, heads_name="permuted")


@pytest.mark.parametrize("name", ["heads.bin", "marks.bin"])
def test_other_parses_are_noticed(run, prefix, name):
    """The same tokens preprocessed with another parser."""
    assert run("--data", prefix, "--control", "permuted").returncode == 0
    header = json.loads(Path(f"{prefix}.json").read_text())
    header["files"][name]["sha256"] = "0" * 64
    Path(f"{prefix}.json").write_text(json.dumps(header))
    with pytest.raises(InputError, match=rf"heads-permuted.json: was made from another .*toy.{name}"):
        PackedData(prefix, heads_name="permuted")
    path = Path(f"{prefix}.heads-permuted.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_files": {}}))  # of earlier versions
    PackedData(prefix, heads_name="permuted")
