"""A result says which model it is of: the checkpoint behind a run, its step, and the hash of its weights."""

from __future__ import annotations

import argparse
import json
import runpy
import shutil
import sys

import pytest
from engine_runs import ROOT, checkpoint, train, write_inputs
from transformers import BertForMaskedLM

from megatron_sas.core.files import sha256_file
from megatron_sas.evaluation.command_line import check_arguments
from megatron_sas.evaluation.provenance import model_source, weights_sha256


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("provenance")
    train(write_inputs(path), path / "run", {"snapshots.every": 2})
    return path / "run"


def test_a_run_is_its_newest_checkpoint_when_the_work_begins(run, tmp_path):
    arguments = argparse.Namespace(output=tmp_path / "o", overwrite=False, batch_tokens=1, device="cpu", model=run)
    check_arguments(arguments)
    weights = checkpoint(run, 6) / "model.safetensors"
    expected = {"model": str(checkpoint(run, 6)), "model_step": 6, "model_sha256": sha256_file(weights)}
    assert model_source(arguments.model) == expected
    assert model_source(run / "snapshots" / "step_00000004")["model_step"] == 4


def test_syntax_says_which_models(run, tmp_path, monkeypatch):
    sentence = {"words": ["w1", "w2", "w3"], "heads": [2, 0, 2], "relns": ["det", "root", "obj"]}
    (tmp_path / "treebank.jsonl").write_text(json.dumps(sentence) + "\n")
    arguments = ["--model", run, "--untrained", run / "snapshots" / "step_00000000", "--device", "cpu"]
    arguments += ["--treebank", tmp_path / "treebank.jsonl", "--output", tmp_path / "out.json"]
    monkeypatch.setattr(sys, "argv", ["eval_syntax.py", *map(str, arguments)])
    monkeypatch.setattr(sys, "path", list(sys.path))
    runpy.run_path(str(ROOT / "tools" / "eval_syntax.py"))["main"]()
    record = json.loads((tmp_path / "out.json").read_text())
    assert record.items() >= model_source(checkpoint(run, 6)).items()
    assert record["untrained"].items() >= model_source(run / "snapshots" / "step_00000000").items()
    assert record["untrained"]["model_step"] == 0 and record["untrained"]["model_sha256"] != record["model_sha256"]


def test_weights_in_shards(run, tmp_path):
    model = BertForMaskedLM.from_pretrained(run / "snapshots" / "step_00000004")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20kB")
    shutil.copytree(tmp_path / "shards", tmp_path / "other")
    shards = sorted((tmp_path / "other").glob("model-*.safetensors"))
    assert len(shards) > 1
    first = weights_sha256(tmp_path / "shards")
    assert first == weights_sha256(tmp_path / "other")
    shards[0].write_bytes(shards[0].read_bytes()[:-1] + b"x")
    assert first != weights_sha256(tmp_path / "other")
    assert weights_sha256(tmp_path) is None
