"""tools/eval_complexity.py on a small random model: text files, packed data, wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from bert_pairs import tiny_hf_bert
from synthetic_data import write_packed
from tool_calls import call_tool

from megatron_sas.core.cli import InputError
from megatron_sas.core.files import sha256_file
from megatron_sas.data.tokenizer import load_tokenizer, save_tokenizer
from megatron_sas.evaluation.complexity import cls_vectors, intrinsic_dimension, weight_norm
from megatron_sas.evaluation.text import pack_file, plain_text
from megatron_sas.run.reading import load_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, packed data for it, and a text over its vocabulary."""
    path = tmp_path_factory.mktemp("complexity")
    write_packed(path, sequences=40)
    tiny_hf_bert(65, max_position_embeddings=32, initializer_range=0.3).save_pretrained(path / "model")
    save_tokenizer(load_tokenizer(path / "vocab.txt"), path / "model", 32)
    words = np.random.default_rng(0).integers(0, 60, (60, 20))
    lines = [json.dumps({"body": " ".join(f"w{word}" for word in row)}) + "\n" for row in words]
    (path / "text.jsonl").write_text("".join(lines))
    return path


def complexity(folder, output, *options):
    arguments = ["--model", folder / "model", "--output", output, "--device", "cpu", *options]
    call_tool("eval_complexity", *arguments)
    return json.loads(output.read_text())


def test_a_text_file_is_packed_and_measured(folder, tmp_path, capsys):
    text = folder / "text.jsonl"
    options = ("--text", text, "--text-field", "body", "--seq-length", 16, "--num-texts", 50)
    record = complexity(folder, tmp_path / "out.json", *options)
    model, tokenizer = load_model(folder / "model")
    rows = pack_file(str(text), tokenizer, seq_length=16, num_sequences=50, text_field="body")
    assert record["intrinsic_dimension"] == intrinsic_dimension(cls_vectors(model, plain_text(rows, 8192), 50))
    assert record["intrinsic_dimension"]["twonn"] > 0
    assert record["weight_norm"] == weight_norm(model)
    assert record["text"] == {"path": str(text), "sha256": sha256_file(text), "sequences": 50, "seq_length": 16}
    assert record["unknown"] == {"num_pieces": int((rows > 3).sum()), "num_unknown": 0, "share": 0.0}
    assert f"intrinsic dimension  {record['intrinsic_dimension']['twonn']:.3f} ±" in capsys.readouterr().out


def test_packed_data_is_measured(folder, tmp_path):
    record = complexity(folder, tmp_path / "out.json", "--text", folder / "data0", "--num-texts", 30)
    assert (record["text"]["sequences"], record["text"]["seq_length"]) == (30, 32)
    counts = record["intrinsic_dimension"]
    assert counts["num_points"] + counts["duplicates"] == 30


def test_wrong_input_is_refused(folder, tmp_path):
    for options, message in [
        (["--text", folder / "text.jsonl"], "no field 'text'"),
        (["--text", folder / "absent.txt"], "absent.txt: no such file"),
        (["--text", "hf:some/data:train"], "--text: is a file or packed data; pack the dataset"),
        (["--text", folder / "text.jsonl", "--seq-length", 33], "--seq-length: 33 is not between 4 and .* 32"),
        (["--text", folder / "data0", "--seq-length", 16], "--seq-length: packed data has its own"),
        (["--text", folder / "data0", "--num-texts", 9], "--num-texts: 9 is below 10"),
    ]:
        with pytest.raises(InputError, match=message):
            complexity(folder, tmp_path / "out.json", *options)
        assert not (tmp_path / "out.json").exists()
