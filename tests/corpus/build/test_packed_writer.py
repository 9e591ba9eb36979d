"""Packed data appear whole or not at all, and nothing is left lying."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import time

import numpy as np
import pytest
from preprocessing import contents, row, run

from megatron_sas.core.cli import InputError
from megatron_sas.corpus.build.packed_writer import PackedWriter, remove_leftovers
from megatron_sas.data.packed import PackedData


def test_hidden_folders_of_others(tmp_path):
    """A folder stays while its owner lives; those of killed owners go, those of other hosts after a day."""

    def folder(name, host, age=0.0):
        path = tmp_path / name
        path.mkdir()
        (path / "owner").write_text(host)
        for entry in (path / "owner", path):
            os.utime(entry, (time.time() - age, time.time() - age))
        return path

    here, day = socket.gethostname(), 25 * 3600
    dead = folder(".out.aaaaaaaa.tmp", here)
    alive = folder(".out.bbbbbbbb.tmp", here, day)
    remote = folder(".out.cccccccc.tmp", "elsewhere")
    remote_old = folder(".out.dddddddd.tmp", "elsewhere", day)
    other = folder(".out.more.eeeeeeee.tmp", here)  # of another output
    with open(alive / "owner") as owner:
        fcntl.flock(owner, fcntl.LOCK_EX)
        assert sorted(remove_leftovers(tmp_path / "out")) == [dead, remote_old]
    assert sorted(path for path in tmp_path.iterdir()) == [alive, remote, other]
    shutil.rmtree(other)


def test_too_many_relations(vocab_file, tmp_path):
    source = tmp_path / "a.conllu"
    source.write_text("".join(row(1, "the", 0, f"r{i}") + "\n\n" for i in range(256)))
    with pytest.raises(InputError, match="more than 255 relation names"):
        run(source, vocab_file, "conllu", tmp_path / "out", seq_length=8)


def test_existing_output(vocab_file, tmp_path):
    source = tmp_path / "a.txt"
    source.write_text("the cat " * 20)
    run(source, vocab_file, "none", tmp_path / "out", seq_length=8)
    before = contents(tmp_path / "out")
    with pytest.raises(InputError, match="exists already"):
        run(source, vocab_file, "none", tmp_path / "out", seq_length=16)
    assert contents(tmp_path / "out") == before
    run(source, vocab_file, "none", tmp_path / "out", seq_length=16, overwrite=True)
    assert PackedData(tmp_path / "out").seq_length == 16


def test_an_error_at_the_very_end_leaves_the_old_data(vocab_file, tmp_path):
    source = tmp_path / "a.txt"
    source.write_text("the cat " * 20)
    run(source, vocab_file, "none", tmp_path / "out", seq_length=8)
    before = contents(tmp_path / "out")

    info = PackedData(tmp_path / "out").tokenizer
    with pytest.raises(TypeError, match="not JSON"), PackedWriter(tmp_path / "out", 16, info, overwrite=True) as writer:
        writer.add(*np.zeros((4, 16), dtype=np.int64))
        writer.finish([""], counts={"not JSON"})  # the header is written last
    assert contents(tmp_path / "out") == before


def test_a_failing_block_leaves_nothing(vocab_file, tmp_path):
    source = tmp_path / "a.txt"
    source.write_text("the cat " * 20)
    run(source, vocab_file, "none", tmp_path / "out", seq_length=8)
    info = PackedData(tmp_path / "out").tokenizer
    before = sorted(tmp_path.iterdir())
    with pytest.raises(RuntimeError), PackedWriter(tmp_path / "other", 8, info) as writer:
        writer.add(*np.zeros((4, 8), dtype=np.int64))
        raise RuntimeError
    assert sorted(tmp_path.iterdir()) == before


def test_a_slash_after_the_prefix_hides_no_output(vocab_file, tmp_path):
    source = tmp_path / "a.txt"
    source.write_text("the cat " * 20)
    run(source, vocab_file, "none", tmp_path / "out", seq_length=8)
    with pytest.raises(InputError, match=r"out\.bin: exists already"):
        run(source, vocab_file, "none", f"{tmp_path}/out/", seq_length=8)


def test_names_that_are_not_utf_8_are_refused_at_the_beginning(vocab_file, tmp_path):
    """A header cannot say them."""
    name = os.fsdecode(b"\xe9")
    folder = tmp_path / name
    folder.mkdir()
    for path in (tmp_path / f"{name}.txt", tmp_path / "a.txt", folder / "vocab.txt"):
        path.write_text(vocab_file.read_text())
    for source, vocabulary, output in [
        (tmp_path / f"{name}.txt", vocab_file, "out"),
        (tmp_path / "a.txt", folder / "vocab.txt", "out"),
        (tmp_path / "a.txt", vocab_file, name),
    ]:
        with pytest.raises(InputError, match="the name is not UTF-8; rename it"):
            run(source, vocabulary, "none", tmp_path / output, seq_length=8)
