"""tools/run_sweep.py with real runs."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest
from engine_runs import ROOT, launch, records, train, weights, write_inputs

TOOL = ROOT / "tools" / "run_sweep.py"
CONDITIONS = """
  minus: {sas.schedule: 0.1}
  release: {sas.schedule: [{start: 0, end: 3, value: 0.1}], run.branch_from: minus@3}
"""


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sweep")
    path = directory / "sweep.yaml"
    path.write_text(f"config: {write_inputs(directory)}\nseeds: [1]\nconditions:{CONDITIONS}")
    return path


@pytest.fixture(scope="module")
def done(sweep):
    """The sweep made once: its directory and what was printed."""
    runs = sweep.parent / "runs"
    return runs, launch(TOOL, sweep, "--output", runs, "--jobs", "2")


@pytest.mark.slow
def test_runs_a_table_and_nothing_twice(sweep, done):
    runs, output = done
    assert output.count("finished") == 2
    assert "minus      1/1" in output and "release    1/1" in output  # the table
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*") if path.is_file() and path.suffix != ".json"}
    again = launch(TOOL, sweep, "--output", runs)
    assert "minus      1/1" in again
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.slow
def test_a_branch_is_the_run_with_that_schedule(sweep, done, tmp_path):
    whole = tmp_path / "whole"
    schedule = [{"start": 0, "end": 3, "value": 0.1}]
    train(sweep.parent / "config.yaml", whole, {"run.seed": 1, "sas.schedule": schedule})
    branch = done[0] / "release" / "seed-1"
    assert records(branch) == records(whole)
    expected = weights(whole, 6)
    assert all(tensor.equal(expected[name]) for name, tensor in weights(branch, 6).items())


@pytest.mark.slow
def test_a_failure_is_named_and_takes_its_branches_along(sweep, tmp_path):
    output = launch(TOOL, sweep, "--output", tmp_path / "runs", "--data.heads=absent", expect=1)
    assert "minus/seed-1: failed with exit code 2 (error: " in output and "heads-absent" in output
    assert f"see {tmp_path / 'runs' / 'logs' / 'minus-seed-1.log'}" in output
    assert not (tmp_path / "runs" / "release").exists()


@pytest.mark.slow
def test_stopped_and_continued(sweep, tmp_path):
    runs = tmp_path / "runs"
    command = [TOOL, sweep, "--output", runs, "--train.steps=400", "--train.decay_horizon=1000"]
    command += ["--checkpoint.every=400", "--checkpoint.at=[3]"]
    process = subprocess.Popen([sys.executable, *map(str, command)], stderr=subprocess.PIPE, text=True)
    metrics = runs / "minus" / "seed-1" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not metrics.exists() or '"step": 5' not in metrics.read_text():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert "the same command continues" in process.communicate(timeout=60)[1]
    assert process.returncode == 1
    stopped = max(records(metrics.parent))
    assert 5 <= stopped < 400
    assert f"{stopped} of 400 updates" in launch(*command, "--list")
