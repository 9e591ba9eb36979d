"""Random kills for a short while (soak.py is the long version), and runs that change their number of processes."""

from __future__ import annotations

import pytest
import soak
from engine_runs import largest_difference, records, weights

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
