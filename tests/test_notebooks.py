"""The Python interface for notebooks: the example of docs/notebooks.md runs, and its numbers belong together."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from engine_runs import checkpoint, train, write_inputs

from megatron_sas.core.cli import InputError
from megatron_sas.run.directory import open_run
from megatron_sas.run.reading import load_model
from megatron_sas.run.records import curves, read_records
from megatron_sas.trajectory.models import model_at

PAGE = Path(__file__).resolve().parents[1] / "docs" / "notebooks.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run `quickstart/base` of three updates, and a branch of it."""
    folder = tmp_path_factory.mktemp("notebooks")
    config, run = write_inputs(folder), folder / "quickstart" / "base"
    train(config, run, {"train.steps": 3, "checkpoint.keep_last": 1, "snapshots.every": 1})
    branch = {"train.steps": 4, "run.branch_from": str(checkpoint(run, 3))}
    train(config, folder / "branch", branch)
    return folder


def test_the_example_runs(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    values: dict = {}
    exec(compile(code, PAGE, "exec"), values)
    assert "3 updates, evaluated after [0, 3]" in capsys.readouterr().out
    maps, rows, sentence = values["maps"], values["rows"], values["sentence"]
    assert maps.shape == (2, 2, 6, 6) and maps.dtype == torch.float32
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 2, 6))
    assert len(rows) == 2 * 2 * 3
    for row in rows:  # a piece a word, behind [CLS]
        dependent, head = row["word"] + 1, sentence.heads[row["word"]] + 1
        place = maps[row["layer"], row["attention_head"]]
        assert row["to_head"] == pytest.approx(float(place[dependent, head]), abs=1e-6)
        assert row["to_dependent"] == pytest.approx(float(place[head, dependent]), abs=1e-6)
    assert values["best"]["to_head"] == max(row["to_head"] for row in rows)


def test_a_step_before_the_branch_is_the_parents_model(folder):
    model, tokenizer = model_at(folder / "branch", 2)
    expected, _ = load_model(folder / "quickstart" / "base" / "snapshots" / "step_00000002")
    assert all(value.equal(expected.state_dict()[name]) for name, value in model.state_dict().items())
    assert not model.training and len(tokenizer) == model.config.vocab_size
    with pytest.raises(InputError, match=r"has no model of step 9; the nearest are of 1, 2, 3, 4"):
        model_at(folder / "branch", 9)


def test_curves_have_columns_of_one_length(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"kind": "evaluation", "step": 0, "time": 1.5, "uas": 0.25, "fields": {"syntax": 0.5}, "ok": true}\n'
        '{"kind": "train", "step": 1, "time": 2.0, "loss": null}\n'
        '{"kind": "evaluation", "step": 5, "time": 3.0, "uas": null, "twonn": 7, "name": "x"}\n'
    )
    nothing = None
    assert curves(path) == {
        "step": [0, 5],
        "time": [1.5, 3.0],
        "uas": [0.25, nothing],
        "fields/syntax": [0.5, nothing],
        "twonn": [nothing, 7],
    }
    assert curves(path, "event") == {}
    assert len(read_records(path)) == 3
    with pytest.raises(InputError, match=r"is not a run; give a directory that contains config\.yaml"):
        open_run(tmp_path)
