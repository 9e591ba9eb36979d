"""tools/run_sweep.py with real runs."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from unittest import mock

import psutil
import pytest
from child_processes import is_alive
from engine_runs import LAUNCHER_VARIABLES, ROOT, records, train, weights, write_inputs
from tool_calls import exit_code

from megatron_sas.core.directory_lock import DirectoryLock

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


def run_sweep(*arguments, expect=0):
    """What the command prints, run in this process; the trainers that it starts are processes of their own."""
    clean = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    printed = io.StringIO()
    environment = mock.patch.dict(os.environ, clean | {"OMP_NUM_THREADS": "1"}, clear=True)
    with environment, contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = exit_code("run_sweep", *arguments)
    assert code == expect, f"exit code {code}\n{printed.getvalue()}"
    return printed.getvalue()


@pytest.fixture(scope="module")
def done(sweep):
    """The sweep made once: its directory and what was printed."""
    runs = sweep.parent / "runs"
    return runs, run_sweep(sweep, "--output", runs, "--jobs", "2")


@pytest.mark.slow
def test_runs_a_table_and_nothing_twice(sweep, done):
    runs, output = done
    assert output.count("finished") == 2
    assert "minus      1/1" in output and "release    1/1" in output  # the table
    kept = [path for path in runs.rglob("*") if path.is_file() and path.suffix != ".json" and path.name != ".lock"]
    before = {path: path.stat().st_mtime_ns for path in kept}
    again = run_sweep(sweep, "--output", runs)
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
    output = run_sweep(sweep, "--output", tmp_path / "runs", "--data.heads=absent", expect=1)
    assert "minus/seed-1: failed with exit code 2 (error: " in output and "heads-absent" in output
    assert f"see {tmp_path / 'runs' / 'logs' / 'minus-seed-1.log'}" in output
    assert "release/seed-1: not started, because minus/seed-1 failed" in output
    assert not (tmp_path / "runs" / "release").exists()


def test_a_failed_parent_takes_along_only_branches_without_their_checkpoint(tmp_path):
    def run(name, parent, checkpoint):
        section = SimpleNamespace(branch_from=str(tmp_path / checkpoint))
        return SimpleNamespace(directory=name, parent=parent, config=SimpleNamespace(run=section))

    (tmp_path / "saved").mkdir()
    parent, other = run("a", None, "-"), run("x", "y", "saved")
    early, late, later = run("b", "a", "saved"), run("c", "a", "missing"), run("d", "c", "missing")
    waiting = [early, late, other, later]
    assert runpy.run_path(str(TOOL))["_branches_lost"](parent, waiting) == [late, later]
    assert waiting == [early, other]


def test_only_the_last_attempt_tells_why_a_run_failed(tmp_path):
    run, log = SimpleNamespace(name="base/seed-1", finished=False), tmp_path / "log"
    log.write_text("error: data of the first attempt\n")
    started = runpy.run_path(str(TOOL))["Running"](run, [], log)
    assert started.outcome(-9, False) == f"base/seed-1: was killed by SIGKILL (no output); see {log}"
    with log.open("a") as file:
        file.write("step 1\nerror: of the second\nbye\n")
    assert started.outcome(2, False) == f"base/seed-1: failed with exit code 2 (error: of the second); see {log}"


@pytest.mark.slow
def test_stopped_and_continued(sweep, tmp_path):
    """Continued by the same command, the run's records and weights are those of a run that was never stopped."""
    runs = tmp_path / "runs"
    command = [sweep, "--output", runs, "--train.steps=60", "--train.decay_horizon=1000"]
    command += ["--checkpoint.every=60", "--checkpoint.at=[3]", "--evaluation.every=20"]
    process = start(TOOL, *command)
    metrics = runs / "minus" / "seed-1" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and '"step": 5' in metrics.read_text(), process)
    process.send_signal(signal.SIGTERM)
    assert "the same command continues" in process.communicate(timeout=60)[1]
    assert process.returncode == 1
    stopped = max(records(metrics.parent))
    assert 5 <= stopped < 60
    assert f"{stopped} of 60 updates" in run_sweep(*command, "--list")
    assert run_sweep(*command).count("finished") == 2
    whole = tmp_path / "whole"
    overrides = {"train.steps": 60, "train.decay_horizon": 1000, "checkpoint.every": 60, "evaluation.every": 20}
    train(sweep.parent / "config.yaml", whole, {**overrides, "run.seed": 1, "sas.schedule": 0.1})
    for kind in ("train", "evaluation"):
        assert records(metrics.parent, kind) == records(whole, kind)
    expected = weights(whole, 60)
    assert all(tensor.equal(expected[name]) for name, tensor in weights(metrics.parent, 60).items())


def test_a_second_command_at_the_same_time_is_refused(sweep, tmp_path):
    lock = DirectoryLock(tmp_path / "runs", "")
    lock.take()
    output = run_sweep(sweep, "--output", tmp_path / "runs", expect=2)
    assert f"process {os.getpid()} on " in output and "choose another --output" in output
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [".lock"]
    lock.close()


@pytest.mark.slow
def test_stopped_while_it_starts_nothing_is_left_running(sweep, tmp_path):
    """torchrun's workers are in sessions of their own."""
    process = start(TOOL, sweep, "--output", tmp_path / "runs", "--processes", "2")
    tree = psutil.Process(process.pid)

    def workers():
        return [p for p in tree.children(recursive=True) if p.ppid() not in (process.pid, 0)]

    wait_for(lambda: len(workers()) >= 2, process)
    found = workers()
    process.send_signal(signal.SIGTERM)
    assert "the same command continues" in process.communicate(timeout=90)[1]
    assert not any(is_alive(worker.pid) for worker in found)


def test_what_ignores_a_request_is_killed_with_its_children(tmp_path):
    """A launcher that will not end, and its worker in a session of its own."""
    code = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(worker.pid, flush=True)
time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    worker = int(process.stdout.readline())
    stopping = runpy.run_path(str(TOOL))["Stopping"](grace=0.2)
    stopping.ask(process, tmp_path)
    assert is_alive(worker) and process.poll() is None
    deadline = time.monotonic() + 30
    while process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
        stopping.ask(process, tmp_path)
    stopping.ended(process)
    wait_for(lambda: not is_alive(worker))
    process.stdout.close()


def start(*command):
    """The command, running."""
    clean = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        stderr=subprocess.PIPE,
        text=True,
        env={**clean, "OMP_NUM_THREADS": "1"},
    )


def wait_for(condition, process=None, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None
        time.sleep(0.05)
