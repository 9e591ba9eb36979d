"""The worked examples of docs/extending.md touch the promised files, and work: alone, together, and in every tool."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import yaml
from engine_runs import ROOT, launch, write_inputs
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from worked_examples import promised_files, read_examples

from megatron_sas.data.packed import PackedData
from megatron_sas.run.records import read_records

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
EXAMPLES = read_examples(PAGE)


def _merge(into: dict, more: dict) -> None:
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _copy(directory: Path) -> Path:
    """A copy of the program, without what is no code."""
    for name in ("megatron_sas", "tools", "tests/support"):
        shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pretrain_mlm.py", directory)
    return directory


def test_examples_touch_no_more_files_than_promised():
    promised = promised_files(PAGE)
    assert [example.title[0].lower() + example.title[1:] for example in EXAMPLES] == list(promised)
    assert {len(example.files) for example in EXAMPLES} <= {1, 2}
    for example, limit in zip(EXAMPLES, promised.values(), strict=True):
        assert len(example.files) == limit, example.title


def test_each_example_applies_alone(tmp_path):
    for number, example in enumerate(EXAMPLES):
        root = tmp_path / str(number)
        for path in example.files:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            if path in example.edits:
                shutil.copy(ROOT / path, root / path)
        example.apply(root)
        for path in example.files:
            compile((root / path).read_text(encoding="utf-8"), path, "exec")


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """One run that uses all examples, measured and reported: its directory, and what was printed."""
    directory = tmp_path_factory.mktemp("extended")
    program = _copy(directory / "program")
    config = yaml.safe_load(write_inputs(directory).read_text())
    for example in EXAMPLES:
        example.apply(program)
        _merge(config, example.settings)
    data = {split: str(directory / split) for split in ("train", "validation")}
    every = {"every": 2}
    _merge(config, {"data": data, "snapshots": every, "checkpoint": every, "evaluation": every})
    _merge(config, {"logging": {"tensorboard": True}})
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    return directory, launch(program / "tests" / "support" / "extended_run.py", directory)


@pytest.mark.slow
def test_sources_and_parser(extended):
    data = PackedData(str(extended[0] / "train"))
    assert data.header["parser"]["name"] == "chain" and data.header["relations"] == ["", "left"]
    assert [entry["name"] for entry in data.header["input_files"]] == ["a.tsv", "b.db"]
    counts = data.header["counts"]
    assert counts["documents"] + counts["documents_of_other_split"] == 40 and counts["unparsed_documents"] == 0
    tokens, heads = data.tokens[[0]][0], data.heads[[0]][0]
    assert heads[tokens > 4][1:].tolist() == list(range(1, 14))


@pytest.mark.slow
def test_architecture_is_trained_exported_and_read_back(extended):
    snapshot = json.loads((extended[0] / "whole" / "snapshots" / "step_00000006" / "config.json").read_text())
    assert (snapshot["architectures"], snapshot["hidden_act"]) == (["BertForMaskedLM"], "relu")
    assert snapshot["megatron_sas_architecture"] == "bert_relu"  # by which the trajectory's models were read


@pytest.mark.slow
def test_terms_mode_schedule_optimizer_and_backend(extended):
    directory, _ = extended
    records = read_records(directory / "whole" / "metrics.jsonl")
    (start,) = (record for record in records if record.get("event") == "start")
    steps = [record for record in records if record["kind"] == "train"]
    assert len(steps) == 6
    for record in steps:
        assert record["loss"] == pytest.approx(record["mlm_loss"] + 0.01 * record["sas"] + 0.001 * record["sink"])
    rates = [record["lr"] for record in steps]
    assert rates == pytest.approx([0.0, 5e-4, 1e-3, *(1e-3 * (2 / step) ** 0.5 for step in (3, 4, 5))])
    assert start["attention"] == "double"


@pytest.mark.slow
def test_resumed_run_has_the_same_bits(extended):
    whole, resumed = (
        load_file(extended[0] / run / "checkpoints" / "step_00000006" / "model.safetensors")
        for run in ("whole", "resumed")
    )
    assert all(whole[name].equal(resumed[name]) for name in whole)


@pytest.mark.slow
def test_evaluation_is_recorded_printed_measured_and_reported(extended):
    directory, printed = extended
    run, report = directory / "whole", directory / "report"
    records = [record for record in read_records(run / "metrics.jsonl") if record["kind"] == "evaluation"]
    assert [record["step"] for record in records] == [0, 2, 4, 6]
    assert all(f"  rank {record['effective_rank']:.2f}  (" in printed for record in records)
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    values = [event.value for event in board.Scalars("evaluation/effective_rank")]
    assert values == pytest.approx([record["effective_rank"] for record in records])
    rows = list(csv.DictReader((run / "trajectory" / "summary.csv").open()))
    measured = {int(row["step"]): float(row["effective_rank"]) for row in rows}
    live = {record["step"]: record["effective_rank"] for record in records}
    assert measured == pytest.approx(live, rel=2e-3)  # of vectors that hardly differ yet
    (row,) = csv.DictReader((report / "table.csv").open())
    assert float(row["effective_rank"]) > 0
    assert "Effective rank ↑" in (report / "report.html").read_text()
    assert "Effective rank" in (report / "table.md").read_text()
    assert "Effective rank" in (report / "figures" / "trajectories.svg").read_text()
    assert "effective_rank" in json.loads((report / "onsets.json").read_text())["runs"][0]
