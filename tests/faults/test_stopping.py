"""Signals and the stop file: a checkpoint, a marker for the batch script, and the same run afterwards."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from engine_runs import LAUNCHER_VARIABLES, ROOT, checkpoint, free_port, override_arguments, records, weights
from processes import steps_done, wait_until

from megatron_sas.run.checkpoint import newest_checkpoint, read_state
from megatron_sas.run.records import read_records

pytestmark = pytest.mark.slow

LONG = {"train.steps": 90_000, "train.decay_horizon": 100_000, "checkpoint.every": 100_000, "evaluation.every": 100_000}
DEEPSPEED = Path(sys.executable).with_name("deepspeed")


def check_stopped(run, reason):
    """Saved where it stopped, and marked; returns that step."""
    assert (run / "requeue").read_text() == reason + "\n"
    assert not (run / "stop").exists()
    step = read_state(newest_checkpoint(run, pytest.fail))["step"]
    lines = read_records(run / "metrics.jsonl")
    assert (lines[-1]["event"], lines[-1]["reason"], lines[-1]["step"]) == ("stopped", reason, step)
    assert sorted(records(run)) == list(range(1, step + 1))
    return step


@pytest.mark.parametrize(
    ("ranks", "number", "to"),
    [(2, signal.SIGTERM, [1]), (2, signal.SIGUSR1, [0]), (2, signal.SIGHUP, [0, 1]), (1, signal.SIGINT, [0])],
)
def test_a_signal_to_any_rank_stops_all(fork_server, config, tmp_path, ranks, number, to):
    run = tmp_path / "run"
    job = fork_server.start(config, run, LONG, ranks=ranks)
    wait_until(lambda: steps_done(run) >= 3, "training")
    job.send(number, to)
    assert job.wait() == [0] * ranks, job.output()
    step = check_stopped(run, number.name)
    assert f"stopped after {step} updates ({number.name}); start the same command again to continue" in job.output()
    assert job.output().count(f"{number.name}: stopping after this update") == (0 in to)  # at once


def test_a_stopped_run_goes_on_as_if_nothing_had_been(fork_server, config, tmp_path):
    """Stopped by the file, in the middle; then finished: no marker, equal to the run without a stop."""
    run, whole, short = tmp_path / "run", tmp_path / "whole", LONG | {"train.steps": 30}
    hold = {"before": "megatron_sas.train.step:Engine.update", "call": 4, "until": str(run / "stop")}
    job = fork_server.start(config, run, short, ranks=2, fault={"hold": hold})
    wait_until(lambda: steps_done(run) >= 3, "training")
    (run / "stop").touch()
    assert job.wait() == [0, 0]
    step = check_stopped(run, f"file {run / 'stop'}")
    assert 3 <= step < 30
    output = fork_server.train(config, run, short, ranks=2)
    assert f"continuing from {checkpoint(run, step)}" in output
    assert not (run / "requeue").exists()
    fork_server.train(config, whole, short, ranks=2)
    assert all(weights(whole, 30)[name].equal(tensor) for name, tensor in weights(run, 30).items())
    assert records(run) == records(whole)


HELD_IMPORT = """
import os, sys, time

class HeldImport:
    def find_spec(self, name, *_):
        if name == "torch" and not os.path.exists({go!r}):
            open({go!r} + "-reached", "w").close()
            end = time.monotonic() + 600  # should the tests be killed
            while not os.path.exists({go!r}) and time.monotonic() < end:
                time.sleep(0.01)

sys.meta_path.insert(0, HeldImport())
"""


def test_a_signal_while_the_program_starts_is_not_lost(fork_server, config, tmp_path):
    """Nothing is done yet, so nothing is saved, and the requeued run is as good as new."""
    run, go = tmp_path / "run", tmp_path / "go"
    hold = {"before": "megatron_sas.launch.environment:initialize_distributed", "until": str(go)}
    job = fork_server.start(config, run, {"train.steps": 4}, fault={"hold": hold})
    wait_until(Path(f"{go}-reached").exists, "the start")
    job.send(signal.SIGTERM)
    go.touch()
    assert job.wait() == [0], job.output()
    assert (run / "requeue").read_text() == "SIGTERM\n"
    assert "stopped after 0 updates (SIGTERM)" in job.output() and not records(run)
    fork_server.train(config, run, {"train.steps": 4})
    assert sorted(records(run)) == [1, 2, 3, 4] and not (run / "requeue").exists()


def test_a_signal_before_torch_is_imported_is_not_lost(config, tmp_path):
    run, go = tmp_path / "run", tmp_path / "go"
    (tmp_path / "sitecustomize.py").write_text(HELD_IMPORT.format(go=str(go)))  # which Python imports when it starts
    command = [sys.executable, "pretrain_mlm.py", "--config", config, "--run.output_dir", run, "--train.steps", "4"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment) as process:
        wait_until(lambda: Path(f"{go}-reached").exists() or process.poll() is not None, "the import of torch")
        process.send_signal(signal.SIGTERM)
        go.touch()
        assert process.wait(180) == 0
    assert (run / "requeue").read_text() == "SIGTERM\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_signal_ends_a_dry_run_at_once(config, tmp_path, number, code):
    command = [sys.executable, "pretrain_mlm.py", "--config", config, "--run.output_dir", tmp_path / "run", "--dry-run"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
    # Where the tests are a background job of a shell, they and their children ignore SIGINT.
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(list(map(str, command)), **options) as process:
        assert process.stdout.readline() == "ok       processes: 1\n"
        process.send_signal(number)
        rest = process.stdout.read()
        assert process.wait(60) == code, rest
    assert "ready" not in rest and "Traceback" not in rest
    assert rest.endswith("error: rank 0: interrupted\n") == (number == signal.SIGINT)


def test_a_directory_belongs_to_one_run_at_a_time(fork_server, config, tmp_path):
    run = tmp_path / "run"
    first = fork_server.start(config, run, LONG)
    wait_until(lambda: steps_done(run) >= 3, "training")
    second = fork_server.start(config, run, LONG)
    assert second.wait() == [2]
    assert f"{run}: process {first.pids[0]} on " in second.output() and "Traceback" not in second.output()
    before = steps_done(run)
    wait_until(lambda: steps_done(run) > before, "the first run going on")
    (run / "stop").touch()
    assert first.wait() == [0], first.output()
    check_stopped(run, f"file {run / 'stop'}")


def test_an_old_stop_file_stops_nothing(fork_server, config, tmp_path):
    run = tmp_path / "run"
    fork_server.train(config, run, {"train.steps": 2})
    for name in ("stop", "requeue"):
        (run / name).touch()
        os.utime(run / name, (1, 1))
    fork_server.train(config, run)
    assert sorted(records(run)) == [1, 2, 3, 4, 5, 6]
    assert not (run / "stop").exists() and not (run / "requeue").exists()


def test_the_second_interrupt_ends_at_once(fork_server, config, tmp_path):
    """While the run, asked to stop by the first, is about to save."""
    run, go = tmp_path / "run", tmp_path / "go"
    hold = {"before": "megatron_sas.train.trainer:Trainer._end", "until": str(go)}
    job = fork_server.start(config, run, LONG, fault={"hold": hold})
    wait_until(lambda: steps_done(run) >= 3, "training")
    job.send(signal.SIGINT)
    wait_until(Path(f"{go}-reached").exists, "the end")
    job.send(signal.SIGINT)
    assert job.wait() == [130], job.output()
    assert "interrupted twice; nothing was saved" in job.output()
    assert "Traceback" not in job.output()
    assert not (run / "requeue").exists()


def test_an_evaluation_does_not_outlast_the_grace_period(fork_server, config, tmp_path):
    """One that takes minutes, on two ranks, with the signal to one of them; it is made when the run continues."""
    run = tmp_path / "run"
    treebank = tmp_path / "treebank.jsonl"
    sentence = {"words": ["w1", "w2"], "heads": [0, 1], "relns": ["root", "dep"]}
    treebank.write_text((json.dumps(sentence) + "\n") * 60_000)
    slow = {"evaluation.treebank": str(treebank), "evaluation.batch_tokens": 8, "evaluation.every": 100_000}
    go = tmp_path / "go"
    hold = {"before": "megatron_sas.train.stop_vote:StopVote.check", "call": 100, "until": str(go)}
    job = fork_server.start(config, run, LONG | slow, ranks=2, fault={"hold": hold})
    wait_until(Path(f"{go}-reached").exists, "the evaluation at step 0")
    started = time.monotonic()
    job.send(signal.SIGUSR1, [1])
    go.touch()
    assert job.wait() == [0, 0], job.output()
    assert time.monotonic() - started < 30
    assert check_stopped(run, "SIGUSR1") == 0
    assert records(run, "evaluation") == {}


class Launched:
    """A launcher with its ranks, as a user or Slurm starts it."""

    def __init__(self, launcher, config, run, log, terminal=None):
        clean = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
        arguments = ["--config", config, *override_arguments({**LONG, "run.output_dir": str(run)})]
        self.run, self.log = run, log
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                [str(a) for a in (*launcher, ROOT / "pretrain_mlm.py", *arguments)],
                stdout=file if terminal is None else terminal,
                stderr=subprocess.STDOUT,
                env={**clean, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            )
        wait_until(lambda: steps_done(run) >= 3, f"training under {launcher}", 120)
        self.family = psutil.Process(self.process.pid).children(recursive=True)

    @staticmethod
    def is_launcher(process):
        return any("launch" in part for part in process.cmdline()[:4])

    def wait(self, seconds=60):
        """The launcher's exit code, when all of its processes have ended."""
        code = self.process.wait(seconds)
        _, alive = psutil.wait_procs(self.family, timeout=seconds)
        assert not alive, self.log.read_text()
        return code

    def close(self):
        for process in [*self.family, psutil.Process(self.process.pid)] if self.process.poll() is None else self.family:
            if process.is_running():
                process.kill()


@pytest.fixture
def launched(config, tmp_path):
    """Start a launcher; whatever is left of it afterwards is killed."""
    started = []

    def start(*launcher, terminal=None):
        started.append(Launched(launcher, config, tmp_path / "run", tmp_path / "log.txt", terminal))
        return started[-1]

    yield start
    for launch in started:
        launch.close()


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


@pytest.mark.parametrize(
    ("number", "options"), [(signal.SIGTERM, ()), (signal.SIGUSR1, ("--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1"))]
)
def test_torchrun_passes_signals_on(launched, number, options):
    job = launched(*TORCHRUN, *options)
    job.process.send_signal(number)
    job.wait()
    check_stopped(job.run, number.name)


def deepspeed():
    return (DEEPSPEED, "--num_gpus", "2", "--master_port", free_port())


@pytest.mark.skipif(not DEEPSPEED.exists(), reason="the deepspeed launcher is not beside this Python")
def test_the_deepspeed_launcher_passes_sigterm_on_to_one_rank_after_another(launched):
    job = launched(*deepspeed())
    (launcher,) = [p for p in job.family if job.is_launcher(p)]
    launcher.send_signal(signal.SIGTERM)
    assert job.wait() != 0  # hence a marker, not an exit code
    check_stopped(job.run, "SIGTERM")


@pytest.mark.skipif(not DEEPSPEED.exists(), reason="the deepspeed launcher is not beside this Python")
def test_a_signal_to_deepspeeds_runner_orphans_the_ranks_and_the_stop_file_reaches_them(launched):
    """Also when the terminal that they print to is gone."""
    window, terminal = pty.openpty()
    job = launched(*deepspeed(), terminal=terminal)
    os.close(terminal)
    job.process.send_signal(signal.SIGTERM)
    assert job.process.wait(60) == -signal.SIGTERM
    os.close(window)
    before = steps_done(job.run)
    wait_until(lambda: steps_done(job.run) > before, "the orphans' progress")
    (job.run / "stop").touch()
    job.wait()
    check_stopped(job.run, f"file {job.run / 'stop'}")
