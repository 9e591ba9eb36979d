"""Random kills for a short while (soak.py is the long version), and runs that change their number of processes."""

from __future__ import annotations

import json
import signal

import pytest
import soak
from engine_runs import checkpoint, largest_difference, moments, records, weights
from processes import steps_done, wait_until

pytestmark = pytest.mark.slow


def test_a_few_random_kills(fork_server, tmp_path):
    report = soak.soak(fork_server, tmp_path, cycles=4, seed=2, steps=72, say=lambda line: None)
    assert report.cycles == sum(report.signals.values()) == 4
    assert report.finished_runs >= 1


STEPS = 60
RUN = {
    "train.steps": STEPS,
    "checkpoint.every": 20,
    "evaluation.every": 20,
    "model.hidden_dropout": 0.0,
    "train.zero_stage": 1,
}


def batches(directory, name):
    """What `fault_injection` wrote down in all processes, in the order of steps and micro-batches."""
    lines = [line.split() for path in directory.glob(f"{name}-*") for line in path.read_text().splitlines()]
    return sorted((int(step), int(index), content) for step, index, content in lines)


def test_one_process_then_two_then_one(fork_server, config, tmp_path):
    """In float32 without dropout: the same batches and masks bit for bit, and the same curves within rounding."""
    for run, parts in (("whole", ((1, STEPS, 1),)), ("parts", ((1, 20, 1), (2, 40, 2), (1, STEPS, 0)))):
        for ranks, steps, stage in parts:
            overrides = {**RUN, "train.steps": steps, "train.zero_stage": stage}
            fault = {"batches": str(tmp_path / f"{run}-batches-{steps}")}
            job = fork_server.start(config, tmp_path / run, overrides, ranks=ranks, fault=fault)
            assert job.wait() == [0] * ranks, job.output()
    seen = batches(tmp_path, "parts-batches")
    assert seen == batches(tmp_path, "whole-batches")
    assert [(step, index) for step, index, _ in seen] == [(step, index) for step in range(STEPS) for index in range(4)]
    for kind in ("train", "evaluation"):
        mine, theirs = records(tmp_path / "parts", kind), records(tmp_path / "whole", kind)
        assert mine.keys() == theirs.keys()
        for step, line in mine.items():
            assert line == pytest.approx(theirs[step], rel=2e-5), f"{kind} {step}"
    assert largest_difference(weights(tmp_path / "parts", STEPS), weights(tmp_path / "whole", STEPS)) < 1e-5


CLOCKED = {"train.steps": 10, "checkpoint.every": None, "logging.every": 4, "evaluation.every": 5}
BY_THE_CLOCK = ("time", "seconds", "tokens_per_second", "memory_gib")


def records_but_for_the_clock(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{name: None if name in BY_THE_CLOCK else value for name, value in line.items()} for line in lines]


def kept(run):
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step_*"))


def test_when_the_clock_saves_shows_nowhere(fork_server, config, tmp_path):
    """After every update, or never: the same records, field for field, and the same weights and moments."""
    often, never = tmp_path / "often", tmp_path / "never"
    fork_server.train(config, often, CLOCKED | {"checkpoint.minutes": 1e-9, "checkpoint.keep_last": 20}, ranks=2)
    fork_server.train(config, never, CLOCKED | {"checkpoint.minutes": 0}, ranks=2)
    assert (kept(often), kept(never)) == (list(range(11)), [0, 10])
    assert records_but_for_the_clock(often) == records_but_for_the_clock(never)
    for read in (weights, moments):
        assert largest_difference(read(often, 10), read(never, 10)) == 0.0


def test_a_killed_run_that_saves_by_the_clock_goes_on(fork_server, config, tmp_path):
    """From one of the last two checkpoints; when all are gone it is not begun again."""
    run, unhurt = tmp_path / "run", tmp_path / "unhurt"
    clock = CLOCKED | {"train.steps": 40, "checkpoint.minutes": 1e-9}
    hold = {"before": "megatron_sas.train.step:Engine.update", "call": 30, "until": str(tmp_path / "never")}
    job = fork_server.start(config, run, clock, fault={"hold": hold})
    wait_until(lambda: (tmp_path / "never-reached").exists() and steps_done(run) >= 29, "training")
    job.send(signal.SIGKILL)
    job.wait()
    assert len(kept(run)) <= 3 and kept(run)[-1] >= 28
    checkpoints = (run / "checkpoints").rename(tmp_path / "elsewhere")
    job = fork_server.start(config, run, clock)
    assert job.wait() == [2]
    assert "holds no checkpoint, but the run's records reach update 29" in job.output()
    checkpoints.rename(run / "checkpoints")
    assert f"continuing from {checkpoint(run, kept(run)[-1])}" in fork_server.train(config, run, clock)
    fork_server.train(config, unhurt, clock | {"checkpoint.minutes": 0})
    assert largest_difference(weights(run, 40), weights(unhurt, 40)) == 0.0
    assert records(run) == records(unhurt)
