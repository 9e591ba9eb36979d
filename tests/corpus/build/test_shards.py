"""Shards in, shards out: whole or absent, left alone when done, the same bytes after a kill."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_sas.core.cli import InputError
from megatron_sas.corpus.build.preprocess import PreprocessSettings
from megatron_sas.corpus.build.shards import parse_shard, preprocess_shards
from megatron_sas.corpus.parsers.given import NoParser
from megatron_sas.corpus.parsers.registry import PARSERS, describe_parser
from megatron_sas.corpus.readers.base import Reader
from megatron_sas.corpus.readers.hub import HUB
from megatron_sas.corpus.readers.registry import READERS_BY_SUFFIX
from megatron_sas.corpus.readers.text import TEXT
from megatron_sas.data.packed import FILES, PackedData

TOOL = Path(__file__).resolve().parents[3] / "tools" / "preprocess_data.py"


@pytest.fixture
def sources(tmp_path):
    """Four inputs; the second holds nothing."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(4):
        text = "" if number == 1 else f"the cat sat. {'q ' * number}running dogs can't run, café!\n" * 20
        (folder / f"part-{number}.txt").write_text(text)
    return sorted(folder.iterdir())


def run(sources, vocab_file, output, shard=(0, 1), **options):
    said = []
    settings = PreprocessSettings([str(s) for s in sources], str(vocab_file), "none", str(output), seq_length=16)
    for name, value in options.items():
        setattr(settings, name, value)
    return preprocess_shards(settings, shard, said.append), said


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_each_job_of_an_array_makes_its_shards(sources, vocab_file, tmp_path):
    whole, array = tmp_path / "whole", tmp_path / "array"
    headers, said = run(sources, vocab_file, whole)
    assert [header["num_sequences"] > 0 for header in headers] == [True, False, True, True]
    assert sum("done before" in line for line in said) == 0
    for job in range(3):
        headers, _ = run(sources, vocab_file, array, (job, 3))
        assert len(headers) == (2 if job == 0 else 1)
    assert contents(array) == contents(whole)
    assert sorted(contents(whole)) == sorted(f"part-{n}.{name}" for n in range(4) for name in (*FILES, "json"))
    assert run(sources, vocab_file, array, (7, 8)) == ([], [])
    before = times(whole)
    _, said = run(sources, vocab_file, whole)
    assert sum("done before" in line for line in said) == 4
    assert times(whole) == before
    with pytest.raises(InputError, match="holds no sequence"):
        PackedData(whole / "part-1")


def test_damaged_and_unfinished_outputs_are_made_again(sources, vocab_file, tmp_path):
    output = tmp_path / "out"
    run(sources, vocab_file, output)
    expected, before = contents(output), times(output)
    damaged = bytearray((output / "part-0.heads.bin").read_bytes())
    damaged[5] ^= 1
    (output / "part-0.heads.bin").write_bytes(damaged)
    (output / "part-3.json").unlink()  # as if killed between the last rename and the header
    _, said = run(sources, vocab_file, output)
    assert contents(output) == expected
    assert [line.endswith("done before") for line in said] == [False, False, True, True, False]
    assert "part-0.heads.bin: content does not match its checksum" in said[0] and "made again" in said[0]
    assert times(output)["part-2.bin"] == before["part-2.bin"]


def test_other_settings_are_refused(sources, vocab_file, tmp_path):
    output = tmp_path / "out"
    run(sources, vocab_file, output)
    expected = contents(output)
    with pytest.raises(
        InputError, match=r"4 of 4 shards failed: .*part-0.json: was made with other values of settings"
    ):
        run(sources, vocab_file, output, split="train")
    sources[2].write_text("another text " * 50)
    with pytest.raises(
        InputError, match=r"1 of 4 shards failed: .*part-2.json: was made with other values of input_files"
    ):
        run(sources, vocab_file, output)
    assert contents(output) == expected
    run(sources[2:3], vocab_file, output, overwrite=True)
    changed = {name for name, content in contents(output).items() if content != expected[name]}
    assert changed == {f"part-2.{name}" for name in ("bin", "idx", "json", "heads.bin", "marks.bin", "relns.bin")}


def test_a_model_that_was_trained_again_is_another_parser(sources, vocab_file, tmp_path):
    """`spacy train` gives every model the same name and version; the same model elsewhere is no other."""
    spacy = pytest.importorskip("spacy")

    def train(folder, seed):
        spacy.util.fix_random_seed(seed)
        nlp = spacy.blank("en")
        nlp.add_pipe("parser").add_label("dep")
        nlp.add_pipe("ner").add_label(f"X{seed}")  # which we do not load
        nlp.initialize()
        nlp.to_disk(folder)

    def again(model, source=sources[0]):
        return run([source], vocab_file, tmp_path / "out", parser=f"spacy:{model}")[1]

    train(tmp_path / "model", 0)
    described = describe_parser(f"spacy:{tmp_path / 'model'}")
    again(tmp_path / "model")
    shutil.copytree(tmp_path / "model", tmp_path / "host" / "model")
    (tmp_path / "host" / "model" / "ner" / "model").write_bytes(b"")
    assert "done before" in again(tmp_path / "host" / "model")[0]
    train(tmp_path / "model", 1)
    other = describe_parser(f"spacy:{tmp_path / 'model'}")
    assert {name for name in other if other[name] != described[name]} == {"sha256"}
    with pytest.raises(InputError, match=r"part-0.json: was made with other values of parser; choose another"):
        again(tmp_path / "model")


def test_outputs_of_a_folder_keep_to_one_library(sources, vocab_file, tmp_path, monkeypatch):
    fastest, made = "slow", []

    class Multiplying(NoParser):
        takes_ops, heads = True, "predicted"

        def __init__(self, ops):
            made.append(ops)

        @staticmethod
        def describe(argument, ops):
            ops = fastest if ops == "fastest" else ops
            if ops == "exotic":
                raise InputError("this machine lacks it")
            return {} if ops == "spacy" else {"ops": ops}

    monkeypatch.setitem(PARSERS, "multiplying", Multiplying)
    output, options = tmp_path / "out", {"parser": "multiplying"}
    run(sources, vocab_file, output, (0, 2), **options)
    fastest = "fast"  # another machine
    (header, _), _ = run(sources, vocab_file, output, (1, 2), **options)
    assert header["parser"] == {"name": "multiplying", "ops": "slow"} and set(made) == {"slow"}
    assert all("done before" in line for line in run(sources, vocab_file, output, **options)[1])
    (output / ".parser-ops").write_text("exotic")
    with pytest.raises(InputError, match=r"^this machine lacks it$"):
        run(sources, vocab_file, output, overwrite=True, **options)

    old, made[:] = tmp_path / "old", []  # as before there was a choice
    run(sources[:2], vocab_file, old, parser_ops="spacy", **options)
    assert not (old / ".parser-ops").exists()
    headers, said = run(sources, vocab_file, old, **options)
    assert set(made) == {"spacy"} and all("ops" not in header["parser"] for header in headers)
    assert ["done before" in line for line in said] == [True, True, False, False]
    with pytest.raises(InputError, match=r"part-0.json: was made with other values of parser"):
        run(sources, vocab_file, old, parser_ops="fast", **options)


def test_a_bad_shard_does_not_stop_the_others(sources, vocab_file, tmp_path):
    sources[0].write_bytes(b"the cat\n\xff\n" * 20)
    with pytest.raises(InputError, match=r"1 of 4 shards failed: .*part-0.txt.* 20 of 40 records left out"):
        run(sources, vocab_file, tmp_path / "out", on_error="skip")
    assert len(list((tmp_path / "out").glob("*.json"))) == 3
    assert not list((tmp_path / "out").glob("*part-0*"))


class _Fails(NoParser):
    """A parser that cannot bear anything."""

    def parse(self, contents, encodings, names):
        if contents:
            raise RuntimeError("out of memory")
        return iter(())


def test_losses_among_few_selected_documents_are_a_share_of_these(vocab_file, tmp_path, monkeypatch):
    """A shard of which --split takes one document in fifty, and the parser none of them."""
    source = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": f"the cat sat {'q ' * number}"}) for number in range(500)]
    source.write_text("\n".join(lines + ["no JSON"] * 20))
    options = {"on_error": "skip", "split": "validation", "validation_share": 0.02}
    (header,), _ = run([source], vocab_file, tmp_path / "good", **options)  # the 20 are a share of all
    selected = header["counts"]["documents"]
    assert 0 < selected < 20 and header["counts"]["skipped"] == 20
    with pytest.raises(InputError, match="20 of 520 records left out, mostly for 'invalid JSON'"):
        run([source], vocab_file, tmp_path / "less", **options, max_skipped=0.03)
    monkeypatch.setitem(PARSERS, "none", _Fails)
    with pytest.raises(InputError, match=rf"20 of 520 records left out and {selected} of {selected} paragraphs left"):
        run([source], vocab_file, tmp_path / "out", **options, max_skipped=0.95)
    assert not list((tmp_path / "out").iterdir())


def test_a_shard_that_is_all_foreign_fails(sources, data_dir, tmp_path):
    """--drop-foreign is asked for, so a little of it is no error; an input of nothing else is."""
    english = "The quick brown fox jumps over the lazy dog, as it has always done.\n"
    russian = "Быстрая коричневая лиса перепрыгивает через ленивую собаку, как всегда.\n"
    for source, text in zip(sources, (russian * 50, english * 50, english * 49 + russian, ""), strict=True):
        source.write_text(text)
    vocab = data_dir / "bert_vocab" / "vocab.txt"
    with pytest.raises(InputError, match=r"^1 of 4 shards failed: .*part-0.txt: 50 of 50 paragraphs left out, mostly"):
        run(sources, vocab, tmp_path / "out", drop_foreign=True)
    assert sorted(path.stem for path in (tmp_path / "out").glob("*.json")) == ["part-1", "part-2", "part-3"]
    _, said = run(sources[1:3], vocab, tmp_path / "more", drop_foreign=True)
    assert [" 0 skipped," in said[0], " 1 skipped," in said[1]] == [True, True]


def test_an_error_that_nobody_foresaw_fails_one_shard(sources, vocab_file, tmp_path, monkeypatch, capsys):
    def fails(name, reading):
        if "part-2" in name:
            raise RuntimeError("CUDA error: an illegal memory access\nmore of it")
        return TEXT.units(name, reading)

    monkeypatch.setitem(READERS_BY_SUFFIX, ".txt", Reader(fails))
    with pytest.raises(InputError, match=r"^1 of 4 shards failed: .*part-2.txt \(RuntimeError: CUDA .* access\)$"):
        run(sources, vocab_file, tmp_path / "out")
    assert sorted(path.stem for path in (tmp_path / "out").glob("*.json")) == ["part-0", "part-1", "part-3"]
    assert "in fails" in capsys.readouterr().err  # where it came from


def test_names():
    assert TEXT.output_name("a/enwiki-00.jsonl.xz") == "enwiki-00" and TEXT.output_name("b.txt") == "b"
    name = "hf:wikimedia/wikipedia:20231101.en:train@3/16"
    assert HUB.output_name(name) == "wikimedia-wikipedia-20231101.en-train-3-16"
    assert parse_shard("2/3") == (2, 3)
    for text in ("3/3", "1", "-1/3", "0/0", "a/b"):
        with pytest.raises(InputError, match="must be i/n"):
            parse_shard(text)


def test_what_is_wrong_for_all_is_said_once(sources, vocab_file, wordless_tokenizer, tmp_path):
    with pytest.raises(InputError, match=r"^[^;]*nothing.txt: no such vocabulary file"):
        run(sources, tmp_path / "nothing.txt", tmp_path / "out")
    with pytest.raises(InputError, match=r"^--parser spacy:nothing: no such spaCy model"):
        run(sources, vocab_file, tmp_path / "out", parser="spacy:nothing")
    with pytest.raises(
        InputError, match=r"^--parser none: takes its words from the tokenizer, but .*wordless does not"
    ):
        run(sources, wordless_tokenizer, tmp_path / "out")


def test_two_inputs_of_one_name(vocab_file, tmp_path):
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_text("")
    with pytest.raises(InputError, match="two inputs would both be written to a;"):
        run([tmp_path / "a.txt", tmp_path / "a.jsonl"], vocab_file, tmp_path / "out")


HELD = """
import runpy, sys, time
from megatron_sas.corpus.build import preprocess

def held(*arguments):
    for number, chunk in enumerate(process_chunks(*arguments)):
        if number == 30:  # no other shard has as many
            time.sleep(600)
        yield chunk

process_chunks, preprocess.process_chunks = preprocess.process_chunks, held
if __name__ == "__main__":
    sys.argv.pop(0)
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_killed_and_started_again(vocab_file, tmp_path):
    """kill -9 in the second shard: then the same command ends with the bytes of an undisturbed run."""
    (tmp_path / "held.py").write_text(HELD)  # the command, which stops there and waits
    folder = tmp_path / "in"
    folder.mkdir()
    for number, lines in enumerate((100, 30_000, 100)):
        (folder / f"part-{number}.txt").write_text(f"the cat sat. {number} running dogs can't run, café!\n" * lines)

    def command(output):
        arguments = ["--input", *sorted(folder.iterdir()), "--tokenizer", vocab_file, "--parser", "none"]
        more = ["--output-dir", output, "--seq-length", 64, "--workers", 2]
        return [sys.executable, str(TOOL), *map(str, arguments + more)]

    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True)
    output = tmp_path / "out"
    python, *rest = command(output)
    environment = {**os.environ, "PYTHONPATH": f"{TOOL.parents[1]}:{TOOL.parent}"}
    process = subprocess.Popen(
        [python, tmp_path / "held.py", *rest], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.time() + 180
    while not any(path.stat().st_size > 100_000 for path in output.glob(".part-1.*/data.marks.bin")):
        if process.poll() is not None or time.time() > deadline:
            process.kill()
            pytest.fail(str(process.communicate()))
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not list(output.glob("part-1*")) and len(list(output.glob(".part-1.*"))) == 1
    first = times(output)["part-0.bin"]
    done = subprocess.run(command(output), check=True, capture_output=True, text=True)
    assert done.stdout.count("done before") == 1
    assert times(output)["part-0.bin"] == first
    assert contents(output) == contents(tmp_path / "whole")  # the hidden folder is gone, too


def test_hidden_folders_of_shards_that_are_done(sources, vocab_file, tmp_path):
    """What a killed job left goes when its shard was finished elsewhere, and what a living one writes stays."""
    output = tmp_path / "out"
    run(sources, vocab_file, output)
    expected = contents(output)
    folders = [output / f".part-{number}.aaaaaaaa.tmp" for number in (0, 2)]
    for folder in folders:
        folder.mkdir()
        (folder / "owner").write_text(socket.gethostname())
    with open(folders[1] / "owner") as owner:
        fcntl.flock(owner, fcntl.LOCK_EX)
        _, said = run(sources, vocab_file, output)
    assert all(line.endswith("done before") for line in said)
    assert [folder.exists() for folder in folders] == [False, True]
    shutil.rmtree(folders[1])
    assert contents(output) == expected
