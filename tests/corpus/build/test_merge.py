"""Merging packed data: the rows one after another, relations renumbered, damage and misfits refused."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tool_calls import call_tool, run_tool

from megatron_sas.core.cli import InputError
from megatron_sas.corpus.build.merge import merge
from megatron_sas.corpus.build.preprocess import PreprocessSettings, preprocess
from megatron_sas.corpus.build.shards import preprocess_shards
from megatron_sas.data.packed import PackedData

TOOL = Path(__file__).resolve().parents[3] / "tools" / "merge_data.py"


def conllu(*relations):
    rows = [f"{n}\tdog\t_\t_\t_\t_\t{n - 1}\t{relation}\t_\t_" for n, relation in enumerate(relations, 1)]
    return "\n".join(rows) + "\n\n"


@pytest.fixture
def parts(tmp_path, vocab_file):
    """Two parsed shards whose relations have different numbers, an empty one, and an unparsed one."""
    (tmp_path / "a.conllu").write_text(conllu("root", "nsubj", "det") * 9)
    (tmp_path / "b.conllu").write_text(conllu("root", "det", "punct") * 7)
    (tmp_path / "c.conllu").write_text("")
    settings = PreprocessSettings([], str(vocab_file), "conllu", str(tmp_path / "out"), seq_length=8)
    settings.inputs = [str(tmp_path / f"{name}.conllu") for name in "abc"]
    preprocess_shards(settings, log=lambda _: None)
    (tmp_path / "d.txt").write_text("the cat sat\n" * 10)
    preprocess(PreprocessSettings([str(tmp_path / "d.txt")], str(vocab_file), "none", f"{tmp_path}/out/d", 8))
    return [str(tmp_path / "out" / name) for name in "abcd"]


def test_merge(parts, tmp_path):
    header = merge(parts, str(tmp_path / "all"))
    merged, sources = PackedData(tmp_path / "all"), [PackedData(parts[number]) for number in (0, 1, 3)]
    merged.verify()
    for stream in ("tokens", "heads", "boundaries"):
        assert np.array_equal(getattr(merged, stream), np.concatenate([getattr(s, stream) for s in sources]))
    names = [np.array(source.relations)[source.deprels] for source in sources]
    assert np.array_equal(np.array(merged.relations)[merged.deprels], np.concatenate(names))
    assert merged.relations == ["", "root", "nsubj", "det", "punct"]
    assert header["parser"] == {"name": "conllu + none"}
    assert header["inputs"] == ["a.conllu", "b.conllu", "c.conllu", "d.txt"]
    for name in ("words", "edges", "sequences", "unparsed_documents"):
        assert header["counts"][name] == sum(source.header["counts"][name] for source in sources)
    assert [part["fingerprint"] for part in header["parts"]] == [source.fingerprint for source in sources]
    assert header["settings"] == sources[0].header["settings"] and "settings" not in header["parts"][0]


def test_settings_of_parts(parts, tmp_path, vocab_file):
    """One record where they agree, each its own where they do not, also through a second merge; one --split in all."""
    (tmp_path / "e.txt").write_text("the dog sat\n" * 10)

    def make(name, **options):
        settings = PreprocessSettings([str(tmp_path / "d.txt")], str(vocab_file), "none", str(tmp_path / name), 8)
        preprocess(replace(settings, **options))
        return str(tmp_path / name)

    skipping, validation = make("skipping", on_error="skip"), make("side", split="validation", validation_share=1.0)
    header = merge([parts[0], skipping], str(tmp_path / "two"))
    assert "settings" not in header
    assert [part["settings"]["on_error"] for part in header["parts"]] == ["refuse", "skip"]
    nested = merge([str(tmp_path / "two"), parts[1]], str(tmp_path / "three"))["parts"]
    assert nested[0]["parts"] == header["parts"] and nested[1]["settings"]["on_error"] == "refuse"
    for given in ([parts[0], validation], [str(tmp_path / "three"), validation]):
        message = r"side: was made with --split validation --validation-share 1.0, .*/(a|three) with no --split; prepr"
        with pytest.raises(InputError, match=message):
            merge(given, str(tmp_path / "all"))
    side = {"inputs": [str(tmp_path / "e.txt")], "split": "validation"}
    share, more = make("share", **side, validation_share=0.9), make("more", **side, validation_share=1.0)
    with pytest.raises(InputError, match=r"share 0\.9, .* --validation-share 1\.0; preprocess with one --split and"):
        merge([validation, share], str(tmp_path / "all"))
    assert merge([validation, more], str(tmp_path / "all"))["settings"]["split"] == "validation"


def test_the_same_text_twice(parts, tmp_path, vocab_file):
    """A part that is named twice, is made of the input of another, or is merged data with another; and the output."""
    output = str(tmp_path / "out" / "all")
    header = merge(parts, output)
    for given, message in (
        ([*parts, output], f"--inputs: {output} is the --output itself; leave it out"),
        ([*parts, parts[0]], f"--inputs: {parts[0]} is given twice; leave one out"),
    ):
        with pytest.raises(InputError) as error:
            merge(given, output, overwrite=True)
        assert str(error.value) == message
    assert PackedData(output).header == header  # as it was
    with pytest.raises(InputError, match=r"^--inputs: .*/a and .*/all hold the same sequences; leave one out$"):
        merge([parts[0], output], str(tmp_path / "more"))
    (tmp_path / "e.txt").write_text("the dog sat\n" * 10)
    inputs = [str(tmp_path / name) for name in ("e.txt", "d.txt")]
    preprocess(PreprocessSettings(inputs, str(vocab_file), "none", str(tmp_path / "de"), 8))
    with pytest.raises(InputError, match=r"^--inputs: .*/d and .*/de hold the same documents of d.txt; leave one out$"):
        merge([parts[3], str(tmp_path / "de")], str(tmp_path / "more"))


def test_parsers_of_parts(parts, tmp_path):
    """Weights that differ are not lost where the name is the same."""
    for prefix, digest in zip(parts[:2], ("1", "2"), strict=True):
        path = Path(f"{prefix}.json")
        parser = {"name": "spacy:en_pipeline", "version": "0.0.0", "sha256": digest}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"parser": parser}))
    header = merge(parts[:2], str(tmp_path / "all"))
    assert header["parser"] == {"name": "spacy:en_pipeline"}
    assert [part["parser"]["sha256"] for part in header["parts"]] == ["1", "2"]
    assert "parser" not in merge(parts[:1], str(tmp_path / "one"))["parts"][0]


def test_misfits_and_damage(parts, tmp_path, vocab_file):
    (tmp_path / "e.txt").write_text("the cat sat\n" * 10)
    preprocess(PreprocessSettings([str(tmp_path / "e.txt")], str(vocab_file), "none", str(tmp_path / "long"), 10))
    vocab_file.write_text(vocab_file.read_text() + "more\n")
    preprocess(PreprocessSettings([str(tmp_path / "e.txt")], str(vocab_file), "none", str(tmp_path / "other"), 8))
    for wrong, message in (
        ("long", "--inputs: .*long has sequences of 10 tokens, .*/a of 8; preprocess with one --seq-length"),
        ("other", "other and .*/a were made with different tokenizers; preprocess with one --tokenizer"),
    ):
        with pytest.raises(InputError, match=message):
            merge([parts[0], str(tmp_path / wrong)], str(tmp_path / "all"))
    with pytest.raises(InputError, match="the name is not UTF-8"):
        merge([*map(str, parts[:1]), os.fsdecode(b"\xe9")], str(tmp_path / "out"))
    with pytest.raises(InputError, match="hold no sequence"):
        merge([parts[2]], str(tmp_path / "all"))
    with pytest.raises(InputError, match="no such file"):
        merge([parts[0], str(tmp_path / "nothing")], str(tmp_path / "all"))
    content = bytearray(Path(f"{parts[1]}.marks.bin").read_bytes())
    content[3] ^= 1
    Path(f"{parts[1]}.marks.bin").write_bytes(content)
    with pytest.raises(InputError, match=r"b.marks.bin: content does not match its checksum"):
        merge(parts, str(tmp_path / "all"))
    assert not list(tmp_path.glob("*all*"))


def test_headers_of_something_else(parts, tmp_path):
    control = Path(f"{parts[0]}.heads-permuted.json")
    control.write_text('{"name": "permuted", "base_fingerprint": "0"}')
    for given in ([*parts, str(control.with_suffix(""))], [str(control.with_suffix("")), *parts]):
        with pytest.raises(InputError, match=r"a.heads-permuted.json: field format is not 'megatron_sas packed"):
            merge(given, str(tmp_path / "all"))
    assert not list(tmp_path.glob("*all*"))


def test_inputs_of_one_name(tmp_path, vocab_file):
    """Every input keeps its hash, also when its name without the folder is that of another."""
    paths = [tmp_path / folder / "a.txt" for folder in ("one", "two")]
    for number, path in enumerate(paths):
        path.parent.mkdir()
        path.write_text(f"the cat sat {'.!'[number]}\n" * 10)
    files = [{"name": "a.txt", "size": 140, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()} for path in paths]
    settings = PreprocessSettings(list(map(str, paths)), str(vocab_file), "none", str(tmp_path / "both"), 8)
    assert preprocess(settings)[0]["input_files"] == files
    prefixes = []
    for path in paths:
        settings.inputs, settings.output = [str(path)], str(path.with_suffix(""))
        preprocess(settings)
        prefixes.append(settings.output)
    header = merge(prefixes, str(tmp_path / "all"))
    assert header["inputs"] == ["a.txt", "a.txt"] and header["input_files"] == files
    # A header that knows files by name alone has lost some.
    path = Path(f"{prefixes[1]}.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "input_files": {"a.txt": files[1]}}))
    with pytest.raises(InputError, match=r"two/a.json: field input_files is that of an earlier program; preprocess"):
        merge(prefixes, str(tmp_path / "again"))


def test_command_line(parts, tmp_path, capsys):
    control = f"{parts[0]}.heads-permuted.json"
    call_tool("make_control", "--data", parts[0], "--control", "permuted")
    given = sorted(map(str, (tmp_path / "out").glob("*.json")))  # what *.json is in a shell
    assert control in given and len(given) == 5
    command = [sys.executable, str(TOOL), "--inputs", *given, "--output", tmp_path / "all"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    total = len(PackedData(tmp_path / "all"))
    assert f"{tmp_path}/all: {total} sequences of 8 from 3 parts" in done.stdout
    assert f"passed over {control} and the like (1): make controls" in done.stdout
    again = run_tool(capsys, "merge_data", *command[2:])
    assert again.returncode == 2 and "exists already" in again.stderr
