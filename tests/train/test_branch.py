"""Branches: bit for bit the run that had their configuration from the start, and refused where there is no such run."""

from __future__ import annotations

import json
import shutil

import pytest
from engine_runs import checkpoint, largest_difference, moments, override_arguments, records, train, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_sas.config import load_config
from megatron_sas.core.cli import InputError
from megatron_sas.core.files import sha256_file
from megatron_sas.export.hf import to_hf
from megatron_sas.run.directory import RunDirectory, find_model
from megatron_sas.run.records import lines_until, read_records
from megatron_sas.train import branch as branching
from megatron_sas.train import dry_run as preflight
from megatron_sas.train import resume
from megatron_sas.train.build import build_state

RELEASE = [{"start": 0, "end": 3, "value": 0.1}]  # the parent's λ is 0.1 until update 4
BOARD = {"logging.tensorboard": True}


@pytest.fixture(scope="module")
def parent(config, tmp_path_factory):
    """A run of 6 updates with checkpoints after 0, 3 and 6."""
    run = tmp_path_factory.mktemp("runs") / "parent"
    train(config, run, BOARD)
    return run


@pytest.fixture(scope="module")
def combined(config, tmp_path_factory):
    """The run that had the branch's schedule from the start."""
    run = tmp_path_factory.mktemp("whole") / "combined"
    train(config, run, {"sas.schedule": RELEASE, **BOARD})
    return run


@pytest.fixture(scope="module")
def branch(config, parent):
    """Beside the parent, released at step 3."""
    run = parent.parent / "branch"
    train(config, run, {"sas.schedule": RELEASE, "run.branch_from": str(checkpoint(parent, 3)), **BOARD})
    return run


def points(run, tag="train/mlm_loss"):
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}, purge_orphaned_data=False).Reload()
    return [(point.step, point.value) for point in board.Scalars(tag)]


def assert_same_run(run, whole, step=6):
    assert largest_difference(weights(run, step), weights(whole, step)) == 0.0
    assert largest_difference(moments(run, step), moments(whole, step)) == 0.0
    for kind in ("train", "evaluation"):
        assert records(run, kind) == records(whole, kind)
    assert points(run) == points(whole)


def test_a_branch_is_the_run_that_had_its_schedule_from_the_start(parent, combined, branch):
    assert_same_run(branch, combined)
    assert largest_difference(weights(branch, 6), weights(parent, 6)) > 1e-5
    assert [path.name for path in sorted((branch / "checkpoints").glob("step_*"))] == ["step_00000006"]
    lines = (branch / "metrics.jsonl").read_bytes().splitlines()
    past = [line for line in (parent / "metrics.jsonl").read_bytes().splitlines() if json.loads(line)["step"] <= 3]
    assert lines[: len(past)] == past
    first = json.loads(lines[len(past)])
    assert (first["kind"], first["step"], first["event"], first["parent"]) == ("event", 3, "branched", "../parent")
    state = json.loads((checkpoint(branch, 6) / "state.json").read_text())
    expected = json.loads((checkpoint(combined, 6) / "state.json").read_text())
    assert state["tokens"] == expected["tokens"]


def test_the_lineage_is_recorded(parent, branch, tmp_path):
    lineage = json.loads((branch / "lineage.json").read_text())
    old = [{"start": 0, "value": 0.1, "end": 4}]
    new = [{"start": 0, "value": 0.1, "end": 3}]
    assert lineage == {
        "format": "megatron_sas lineage",
        "version": 1,
        "parent_run": "../parent",
        "checkpoint": "step_00000003",
        "step": 3,
        "manifest_sha256": sha256_file(checkpoint(parent, 3) / "manifest.json"),
        "changed": {"sas.schedule": [old, new]},
    }
    state = json.loads((checkpoint(branch, 6) / "state.json").read_text())
    assert state["lineage"] == [{name: lineage[name] for name in list(lineage)[2:]}]
    to_hf(branch, tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "| branched from | `../parent` at update 3, where sas.schedule changed |" in card


def test_a_branch_resumes_and_no_longer_needs_its_parent(config, parent, combined, tmp_path):
    """As a kill leaves it after update 5, with the parent gone."""
    shutil.copytree(parent, tmp_path / "parent")
    run, source = tmp_path / "run", {"run.branch_from": str(tmp_path / "parent" / "checkpoints" / "step_00000003")}
    train(config, run, {"sas.schedule": RELEASE, "checkpoint.every": 1, **source, **BOARD})
    shutil.rmtree(tmp_path / "parent")
    for step in (5, 6):
        shutil.rmtree(checkpoint(run, step))
    (run / "checkpoints" / "latest").write_text("step_00000004\n")
    train(config, run, {"sas.schedule": RELEASE, **source, **BOARD})
    assert_same_run(run, combined)
    with pytest.raises(InputError, match=r"other values of run\.branch_from"):
        train(config, run, {"sas.schedule": RELEASE})


@pytest.mark.parametrize("call", ["write_json_atomic", "write_bytes_atomic", "remove_directory", "write_text_atomic"])
def test_a_branch_killed_while_it_begins_begins_anew(config, parent, combined, tmp_path, monkeypatch, call):
    """Between any two writes; an earlier attempt has left snapshots and TensorBoard points."""
    run, changed = tmp_path / "run", {"sas.schedule": RELEASE, "run.branch_from": str(checkpoint(parent, 3)), **BOARD}
    if call != "write_text_atomic":
        settings = load_config(config, override_arguments({**changed, "run.output_dir": str(run)}))
        run.mkdir()
        (run / "config.yaml").write_text(settings.to_yaml())
        branching.begin_branch(RunDirectory(run), branching.find_branch(settings, print))
        (run / "metrics.jsonl").write_bytes(lines_until(parent / "metrics.jsonl", 5))
        shutil.copytree(parent / "tensorboard", run / "tensorboard")
        (run / "snapshots" / "step_00000002").mkdir(parents=True)

    def die(path, *_):
        path.parent.mkdir(exist_ok=True)
        path.with_name(f".{path.name}.x.tmp").touch()
        raise KeyboardInterrupt  # which nothing catches

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(resume if call == "write_text_atomic" else branching, call, die)
        train(config, run, changed)
    train(config, run, changed)
    assert_same_run(run, combined)
    assert not (run / "snapshots").exists()


def test_a_branch_that_has_lost_its_checkpoints_is_not_begun_anew(config, parent, branch, combined, tmp_path):
    """The parent's records prove nothing."""
    run, changed = tmp_path / "run", {"sas.schedule": RELEASE, "run.branch_from": str(checkpoint(parent, 3)), **BOARD}
    shutil.copytree(branch, run, ignore=shutil.ignore_patterns("checkpoints"))
    (run / "snapshots" / "step_00000004").mkdir(parents=True)
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match="holds no checkpoint, but the run's records reach update 6"):
        train(config, run, changed)
    assert (run / "snapshots" / "step_00000004").exists() and (run / "metrics.jsonl").read_bytes() == before
    (run / "metrics.jsonl").write_bytes(lines_until(run / "metrics.jsonl", 3))  # killed before its first update
    train(config, run, changed)
    assert_same_run(run, combined)


def test_a_chain(config, parent, branch, combined, tmp_path):
    """A branch of a branch, from a run directory, with another ZeRO stage; and one at step 0."""
    run = branch.parent / "chain"
    longer = [*RELEASE, {"start": 6, "value": -0.1}]
    changed = {"sas.schedule": longer, "train.steps": 8, "train.zero_stage": 2, **BOARD}
    train(config, run, {**changed, "run.branch_from": str(branch)})
    whole = tmp_path / "whole"
    train(config, whole, {**changed, "train.zero_stage": 0})
    assert largest_difference(weights(run, 8), weights(whole, 8)) < 1e-6
    assert records(run).keys() == records(whole).keys()
    assert sorted(records(run, "evaluation")) == [0, 3, 6, 8]  # 6 is the parent's, and was not made again
    lineage = json.loads((checkpoint(run, 8) / "state.json").read_text())["lineage"]
    assert [(link["parent_run"], link["step"]) for link in lineage] == [("../parent", 3), ("../branch", 6)]
    assert list(lineage[1]["changed"]) == ["sas.schedule", "train.steps", "train.zero_stage"]
    branched = [line for line in read_records(run / "metrics.jsonl") if line.get("event") == "branched"]
    assert [line["step"] for line in branched] == [3, 6]
    start = branch.parent / "start"
    train(config, start, {"sas.schedule": 0, "train.steps": 1, "run.branch_from": str(checkpoint(parent, 0))})
    assert records(start)[1]["mlm_loss"] == records(parent)[1]["mlm_loss"]


def refusal(config, run, overrides):
    """The one line with which a branch is refused, before anything is written."""
    with pytest.raises(InputError) as error:
        build_state(load_config(config, override_arguments({**overrides, "run.output_dir": str(run)})), print)
    assert "\n" not in str(error.value)
    assert not run.exists()
    return str(error.value)


def test_what_contradicts_the_past_is_refused(config, parent, tmp_path):
    source = {"run.branch_from": str(checkpoint(parent, 3))}
    message = refusal(config, tmp_path / "a", {**source, "sas.schedule": 0.2})
    assert "sas.schedule says λ = 0.2 for update 1, which was made with λ = 0.1; keep the parent's stages" in message
    assert '[{"start": 0, "value": 0.1, "end": 4}]' in message
    early = [{"start": 0, "end": 2, "value": 0.1}]
    assert "λ = 0 for update 3, which was made with λ = 0.1" in refusal(
        config, tmp_path / "b", {**source, "sas.schedule": early}
    )
    for name, value in {"run.seed": 3, "train.learning_rate": 0.5, "train.global_batch_size": 4}.items():
        assert f"was made with other values of {name} (" in refusal(config, tmp_path / "c", {**source, name: value})
    message = refusal(config, tmp_path / "d", {**source, "model.hidden_dropout": 0.0, "data.mask_prob": 0.3})
    assert "other values of model.hidden_dropout, data.mask_prob; restore them" in message
    assert "leaves nothing to do after step 3" in refusal(config, tmp_path / "e", {**source, "train.steps": 3})


def test_what_is_no_checkpoint_of_a_run_is_refused(config, parent, tmp_path):
    def at(path):
        return {"run.branch_from": str(path)}

    assert "no such directory" in refusal(config, tmp_path / "a", at(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    assert "has no checkpoint" in refusal(config, tmp_path / "b", at(tmp_path / "empty"))
    shutil.copytree(checkpoint(parent, 3), tmp_path / "step_00000003")
    assert "is not in the run that wrote it" in refusal(config, tmp_path / "c", at(tmp_path / "step_00000003"))
    (tmp_path / "step_00000003" / "state.json").write_text("{}")
    assert "state.json: has 2 bytes, not" in refusal(config, tmp_path / "d", at(tmp_path / "step_00000003"))


def test_a_branch_may_find_its_data_elsewhere(config, parent, tmp_path):
    """Their contents count, and the lineage does not name them as changed."""
    shutil.copytree(config.parent, tmp_path / "node", ignore=shutil.ignore_patterns("run"))
    first, second = (str(tmp_path / "node" / name) for name in ("data0", "data1"))
    changed = {"data.train": first, "data.validation": second, "run.branch_from": str(checkpoint(parent, 3))}
    settings = load_config(config, override_arguments({**changed, "run.output_dir": str(tmp_path / "run")}))
    assert build_state(settings, print).branch.lineage["changed"] == {}
    changed |= {"data.train": second, "data.validation": first}
    assert "is not the data that the run was started with" in refusal(config, tmp_path / "run", changed)


def test_other_heads_and_another_regularizer_may_begin_at_a_branch(config, parent, tmp_path):
    source = {"run.branch_from": str(checkpoint(parent, 3))}
    parts = build_state(
        load_config(config, override_arguments({**source, "sas.mode": "uniform", "run.output_dir": str(tmp_path)})),
        print,
    )
    assert parts.branch.lineage["changed"] == {"sas.mode": ["max", "uniform"]}
    message = refusal(config, tmp_path / "a", {**source, "data.heads": "permuted"})
    assert "permuted" in message and "other values" not in message  # nobody made that control


def test_a_dry_run_says_where_it_branches(config, parent, tmp_path, capsys):
    settings = load_config(
        config,
        override_arguments({"run.branch_from": str(parent), "run.output_dir": str(tmp_path / "run"), "train.steps": 9}),
    )
    report = preflight.Report()
    preflight._check_configured(settings, report)
    preflight._try_one_step(settings, report)
    output = capsys.readouterr().out
    assert report.agree(), output
    newest = find_model(parent)
    assert f"ok       branch: from {newest}, changes train.steps" in output
    assert "disk space: 1 checkpoints of" in output
    assert f"one step: branching from {newest}, masked-LM loss" in output
    assert not (tmp_path / "run").exists()
