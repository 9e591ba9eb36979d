"""A result says which model it is of: the checkpoint behind a run, its step, and the hash of its weights."""

from __future__ import annotations

import argparse
import json
import shutil

import pytest
from engine_runs import checkpoint, train, write_inputs
from tool_calls import call_tool
from transformers import AutoTokenizer, BertForMaskedLM

from megatron_sas.core.cli import InputError
from megatron_sas.core.files import sha256_file
from megatron_sas.evaluation.command_line import check_arguments
from megatron_sas.evaluation.provenance import model_source, weights_sha256
from megatron_sas.export.hf import from_hf, to_hf


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


def test_the_step_stays_with_copies_and_exports_and_what_transformers_makes_of_them(run, tmp_path):
    shutil.copytree(run / "snapshots" / "step_00000004", tmp_path / "copy")
    to_hf(run, tmp_path / "hf")
    BertForMaskedLM.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "again")
    AutoTokenizer.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "again")
    from_hf(tmp_path / "again", tmp_path / "checkpoint")
    to_hf(tmp_path / "checkpoint", tmp_path / "back")
    found = {
        name: model_source(tmp_path / name)["model_step"] for name in ("copy", "hf", "again", "checkpoint", "back")
    }
    assert found == {"copy": 4, "hf": 6, "again": 6, "checkpoint": 6, "back": 6}
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    for wrong in ("6", -1, True):
        (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "megatron_sas_step": wrong}))
        with pytest.raises(InputError, match=f"hf: records {wrong!r} as its step, not a whole number"):
            model_source(tmp_path / "hf")
    del config["megatron_sas_step"]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    assert model_source(tmp_path / "hf")["model_step"] is None


def test_syntax_says_which_models(run, tmp_path):
    sentence = {"words": ["w1", "w2", "w3"], "heads": [2, 0, 2], "relns": ["det", "root", "obj"]}
    (tmp_path / "treebank.jsonl").write_text(json.dumps(sentence) + "\n")
    arguments = ["--model", run, "--untrained", run / "snapshots" / "step_00000000", "--device", "cpu"]
    arguments += ["--treebank", tmp_path / "treebank.jsonl", "--output", tmp_path / "out.json"]
    call_tool("eval_syntax", *arguments)
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
