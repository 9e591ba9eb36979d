"""Updates with NaN or infinity: skipped everywhere alike, counted, reported, and the end of a run when they go on."""

from __future__ import annotations

import json

import pytest
from engine_runs import (
    checkpoint,
    largest_difference,
    moments,
    records,
    train,
    train_two_processes,
    weights,
)
from nonfinite import poisoned

from megatron_sas.core.cli import InputError
from megatron_sas.data.sampler import global_samples
from megatron_sas.run.records import read_records

VARIANTS = [(stage, precision) for stage in (0, 1, 2, 3) for precision in ("fp32", "bf16")]
RESUMED = [(0, "bf16"), (1, "bf16"), (2, "fp32"), (3, "fp32")]
EVERY = {"checkpoint.every": 1, "evaluation.every": 6}


def skipped_events(run):
    return [line for line in read_records(run / "metrics.jsonl") if line.get("event") == "skipped_update"]


@pytest.fixture(scope="module")
def clean(config, tmp_path_factory):
    run = tmp_path_factory.mktemp("clean") / "run"
    train(config, run, EVERY)
    return run


@pytest.mark.parametrize("how", ["nan", "inf", "gradient", "finite gradient"])
def test_a_spoilt_update_changes_nothing(config, clean, tmp_path, how, capsys):
    run = tmp_path / "run"
    with poisoned([3], how):
        train(config, run, {**EVERY, "train.steps": 3})
    assert largest_difference(weights(run, 2), weights(clean, 2)) == 0.0
    assert largest_difference(weights(run, 3), weights(clean, 2)) == 0.0
    assert largest_difference(moments(run, 3), moments(clean, 2)) == 0.0
    assert "step 3: update skipped (loss " in capsys.readouterr().out
    (event,) = skipped_events(run)
    samples, _ = global_samples(2, 8, 24, 1234)
    assert (event["step"], event["total"], event["samples"]) == (3, 1, samples.tolist())
    lines = records(run)
    assert lines[3]["grad_norm"] is None
    assert lines[2]["grad_norm"] == records(clean)[2]["grad_norm"]
    assert json.loads((checkpoint(run, 3) / "state.json").read_text())["skipped"] == {"total": 1, "in_a_row": 1}


def test_a_run_that_goes_on_failing_ends_with_the_checkpoint_from_before(config, clean, tmp_path):
    run = tmp_path / "run"
    with poisoned([4, 5, 6]), pytest.raises(InputError, match="updates 4 to 5 were all skipped") as error:
        train(config, run, {**EVERY, "train.max_nonfinite_updates": 2})
    assert "train.max_nonfinite_updates: 2" in str(error.value)
    assert sorted(path.name for path in (run / "checkpoints").glob("*"))[-1] == "step_00000003"
    assert (run / "checkpoints" / "latest").read_text() == "step_00000003\n"
    assert [event["step"] for event in skipped_events(run)] == [4, 5]
    train(config, run, EVERY)  # the cause is gone
    assert largest_difference(weights(run, 6), weights(clean, 6)) == 0.0
    assert records(run) == records(clean)
    assert skipped_events(run) == []


def test_spoilt_updates_that_are_not_in_a_row_end_nothing(config, tmp_path):
    run = tmp_path / "run"
    with poisoned([2, 4, 6]):
        train(config, run, {**EVERY, "train.max_nonfinite_updates": 2, "logging.every": 3})
    assert [(event["step"], event["total"]) for event in skipped_events(run)] == [(2, 1), (4, 2), (6, 3)]
    saved = sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step_*"))
    assert saved == [0, 1, 3, 5, 6]  # none right after a skipped update, but for the last


@pytest.fixture(scope="module")
def two(fork_server, config, tmp_path_factory):
    """Updates 3 and 6 spoilt on rank 1, without a break and continued from checkpoint 4."""
    path, runs = tmp_path_factory.mktemp("two"), []
    for stage, precision in VARIANTS:
        overrides = {**EVERY, "train.zero_stage": stage, "train.precision": precision}
        common = {"overrides": overrides, "poison": {"updates": [3, 6], "rank": 1}}
        runs.append({"name": f"whole-{stage}-{precision}", **common})
        if (stage, precision) not in RESUMED:
            continue
        killed = {"copy_of": f"whole-{stage}-{precision}", "without": ["step_00000005", "step_00000006"]}
        runs.append({"name": f"parts-{stage}-{precision}", **common, **killed})
    train_two_processes(fork_server, config, path, runs)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "precision"), VARIANTS)
def test_all_ranks_skip_what_one_cannot_use(two, stage, precision):
    whole = two / f"whole-{stage}-{precision}"
    assert [event["step"] for event in skipped_events(whole)] == [3, 6]
    assert largest_difference(weights(whole, 6), weights(whole, 5)) == 0.0
    assert largest_difference(moments(whole, 6), moments(whole, 5)) == 0.0
    assert largest_difference(weights(whole, 5), weights(whole, 4)) > 0.0


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "precision"), RESUMED)
def test_a_run_resumes_exactly_after_a_skipped_update(two, stage, precision):
    whole, parts = two / f"whole-{stage}-{precision}", two / f"parts-{stage}-{precision}"
    assert largest_difference(weights(parts, 6), weights(whole, 6)) == 0.0
    assert largest_difference(moments(parts, 6), moments(whole, 6)) == 0.0
    assert records(parts) == records(whole)
    assert [event["total"] for event in skipped_events(parts)] == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_stages_skip_alike(two, stage):
    """AdamW's step count too: stage 3 leaves its step out, the others have it change nothing."""
    assert largest_difference(weights(two / f"whole-{stage}-fp32", 6), weights(two / "whole-0-fp32", 6)) < 1e-5
