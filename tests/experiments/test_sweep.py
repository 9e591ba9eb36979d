"""The plan of a sweep: which runs, with which configuration, and what is refused."""

from __future__ import annotations

import json

import pytest
from engine_runs import ROOT, write_inputs

from megatron_sas.core.cli import InputError
from megatron_sas.experiments.sweep import SWEEP, describe, plan_sweep

CONDITIONS = """
  base: {sas.schedule: 0}
  minus: {sas.schedule: 0.1}
  plus: {sas.schedule: -0.1}
  release: {sas.schedule: [{start: 0, end: 2, value: 0.1}], run.branch_from: minus@2}
  control: {sas.schedule: 0.1, data.heads: permuted}
  ramp: {sas.schedule: [{start: 0, end: 4, value: 0.0, end_value: 0.1}]}
  whole: {sas.schedule: [{start: 0, end: 6, value: 0.1}]}
  empty:
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def write_sweep(config, tmp_path):
    def write(conditions: str = CONDITIONS, seeds: str = "[7, 8]", more: str = ""):
        path = tmp_path / "sweep.yaml"
        path.write_text(f"config: {config}\nseeds: {seeds}\n{more}conditions:{conditions}\n")
        return path

    return write


def test_runs_and_their_configurations(write_sweep, tmp_path):
    sweep = plan_sweep(write_sweep(), tmp_path / "runs", ["--checkpoint.every=2", "--train.steps", "6"])
    assert len(sweep.runs) == 16
    assert [run.seed for run in sweep.runs] == [7] * 8 + [8] * 8  # whole seeds first: a sweep cut short can be read
    run = sweep.runs[1]
    assert (run.name, run.config.run.seed, run.config.run.output_dir) == ("minus/seed-7", 7, str(run.directory))
    assert run.directory == tmp_path / "runs" / "minus" / "seed-7"
    assert run.config.sas.schedule(0) == 0.1 and run.config.checkpoint.every == 2
    branch = sweep.runs[3]
    assert branch.parent == run.directory
    assert branch.config.run.branch_from == str(run.directory / "checkpoints" / "step_00000002")
    assert not run.finished and run.steps_done == 0


def test_a_condition_pins_a_seed_of_a_part(write_sweep, tmp_path):
    conditions = "\n  data: {seed.init: 1}\n  init: {seed.data: 1, seed.dropout: 1}"
    sweep = plan_sweep(write_sweep(conditions), tmp_path)
    found = {run.name: tuple(run.config.seeds()) for run in sweep.runs}
    assert found == {
        "data/seed-7": (1, 7, 7),
        "init/seed-7": (7, 1, 1),
        "data/seed-8": (1, 8, 8),
        "init/seed-8": (8, 1, 1),
    }


def test_what_a_run_is_to_the_analysis(write_sweep, tmp_path):
    sweep = plan_sweep(write_sweep(seeds="[7]"), tmp_path, ["--checkpoint.every=2"])
    sweep.write(tmp_path)
    written = json.loads((tmp_path / SWEEP).read_text())
    assert written["title"] == "sweep"
    found = {entry["condition"]: (entry["role"], entry["release_step"]) for entry in written["runs"]}
    assert found == {
        "base": ("base", None),
        "minus": ("suppress", None),
        "plus": ("promote", None),
        "release": ("release", 2),
        "control": ("control", None),
        "ramp": ("other", None),
        "whole": ("suppress", None),  # its stage ends with the run
        "empty": ("release", 4),  # the configuration's own schedule
    }
    assert written["runs"][3]["directory"] == "release/seed-7"


@pytest.mark.parametrize("name", ["toy", "mini", "paper"])
def test_examples(name, tmp_path):
    sweep = plan_sweep(ROOT / "examples" / "experiments" / f"{name}.yaml", tmp_path)
    roles = [describe(run.config)["role"] for run in sweep.runs if run.seed == 1]
    assert {*roles} == {"base", "suppress", "promote", "release", "control"}
    assert roles.count("control") == {"toy": 3, "mini": 4, "paper": 3}[name]
    assert len(sweep.runs) == 3 * len(roles)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"conditions": " {}"}, "conditions: must be a mapping"),
        ({"seeds": "[1, 1]"}, "seeds: must be a list of different whole numbers"),
        ({"seeds": "3"}, "seeds: must be a list"),
        ({"more": "jobs: 2\n"}, "jobs: unknown field; known: conditions, config, seeds, title"),
        ({"conditions": " {../x: {}}"}, "conditions.../x: the name becomes a directory"),
        ({"conditions": " {a: 3}"}, "conditions.a: must be a mapping"),
        ({"conditions": " {a: {sas.lambda: 3}}"}, "sas.lambda: unknown field"),
        ({"conditions": " {a: {run.seed: 3}}"}, "conditions.a: run.seed: the sweep sets this itself"),
        (
            {"conditions": " {a: {run.branch_from: b@3}, b: {}}"},
            "'b@3' is not CONDITION@STEP with a condition that stands",
        ),
        ({"conditions": " {b: {}, a: {run.branch_from: b@2}}"}, "b writes no checkpoint at step 2; add it to"),
        (
            {"conditions": " {b: {checkpoint.keep_last: 1}, a: {run.branch_from: b@3}}"},
            "b may have removed that checkpoint",
        ),
    ],
)
def test_faults(write_sweep, tmp_path, arguments, message):
    with pytest.raises(InputError) as caught:
        plan_sweep(write_sweep(**arguments), tmp_path / "runs")
    assert message in str(caught.value)
    assert not (tmp_path / "runs").exists()


def begin(run, finished_at=None):
    """What the trainer leaves of a planned run."""
    run.directory.mkdir(parents=True)
    (run.directory / "config.yaml").write_text(run.config.to_yaml())
    if finished_at is not None:
        line = {"kind": "event", "step": finished_at, "event": "finished"}
        (run.directory / "metrics.jsonl").write_text(json.dumps(line) + "\n")


def test_a_run_that_was_begun_as_something_else_is_refused(write_sweep, tmp_path):
    """Also a finished one, which the analysis would take for what the file says now; records may change."""
    runs = tmp_path / "runs"
    before = "\n  minus: {sas.schedule: 0.1}\n  release: {sas.schedule: 0.1, run.branch_from: minus@3}"
    for run in plan_sweep(write_sweep(before, "[7]"), runs).runs:
        begin(run, finished_at=6)
    more = ["--evaluation.every=2", "--train.steps=8"]
    assert [run.finished for run in plan_sweep(write_sweep(before, "[7]"), runs).runs] == [True, True]
    assert [run.finished for run in plan_sweep(write_sweep(before, "[7]"), runs, more).runs] == [False, False]
    (tmp_path / "moved").symlink_to(runs)
    assert plan_sweep(write_sweep(before, "[7]"), tmp_path / "moved").runs[1].finished  # the branch's parent moved too
    for conditions, overrides, message in [
        (
            before.replace("minus: {sas.schedule: 0.1}", "minus: {sas.schedule: 0.2}"),
            [],
            "other values of sas.schedule",
        ),
        (before, ["--train.learning_rate=0.5"], "other values of train.learning_rate"),
        (before, ["--train.steps=5"], "finished after 6 updates, train.steps is now 5"),
    ]:
        with pytest.raises(InputError, match=message) as caught:
            plan_sweep(write_sweep(conditions, "[7]"), runs, overrides)
        assert "minus/seed-7/config.yaml: the run there" in str(caught.value) and "\n" not in str(caught.value)
    for path in runs.glob("*/*/metrics.jsonl"):
        path.unlink()
    # Without a checkpoint either, they start anew.
    plan_sweep(write_sweep(before, "[7]"), runs, ["--train.learning_rate=0.5"])
    (runs / "minus" / "seed-7" / "checkpoints" / "step_00000003").mkdir(parents=True)
    with pytest.raises(InputError, match="other values of train"):
        plan_sweep(write_sweep(before, "[7]"), runs, ["--train.learning_rate=0.5"])


def test_a_finished_run_was_finished_with_the_data_of_the_sweep(config, write_sweep, tmp_path):
    """Nothing will open them to compare: so their names, wherever a job has put them."""
    path, runs = write_sweep("\n  base: {}", "[7]"), tmp_path / "runs"
    begin(plan_sweep(path, runs).runs[0], finished_at=6)
    assert plan_sweep(path, runs, ["--data.train=/node/data0", "--data.validation=/node/data1"]).runs[0].finished
    for other in ("--data.train=/node/data2", "--data.validation=null", "--data.train=[/node/data0, data1]"):
        with pytest.raises(InputError, match=r"finished with other values of data\.train or data\.validation"):
            plan_sweep(path, runs, [other])


def test_all_faults_at_once(write_sweep, tmp_path):
    with pytest.raises(InputError, match="2 faults") as caught:
        plan_sweep(write_sweep(" {a: {sas.mode: 3}, b: {train.step: 3}}"), tmp_path)
    assert "conditions.a" in str(caught.value) and "conditions.b" in str(caught.value)
