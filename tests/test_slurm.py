"""The batch scripts of examples/slurm, run with stand-ins for sbatch, srun and scontrol (tests/slurm/bin)."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from engine_runs import LAUNCHER_VARIABLES, ROOT, largest_difference, records, train, weights, write_inputs
from synthetic_data import write_vocabulary

from megatron_sas.run.records import read_records

STAND_INS = ROOT / "tests" / "slurm" / "bin"
SCRIPTS = ROOT / "examples" / "slurm"
SHELLCHECK = Path(sys.executable).with_name("shellcheck")


def free_job_id() -> int:
    """A job number whose MASTER_PORT (see common.sh) nobody listens on."""
    while True:
        number = random.randrange(1_000, 12_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", 20_000 + number)):
                return number


class Job:
    """A batch script under the stand-ins, started at once."""

    def __init__(self, directory: Path, script: str, *arguments: object, options: tuple = (), **environment: str):
        self.directory = directory
        directory.mkdir(exist_ok=True)
        clean = {
            name: value
            for name, value in os.environ.items()
            if name not in LAUNCHER_VARIABLES and not name.startswith("SLURM_")
        }
        self.process = subprocess.Popen(
            ["sbatch", *options, f"examples/slurm/{script}", *map(str, arguments)],
            cwd=ROOT,  # submitted from the repository's root, as the scripts say
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={
                **clean,
                "PATH": f"{STAND_INS}:{clean['PATH']}",
                "STAND_IN": str(directory),
                "JOB_ID": str(free_job_id()),
                "PYTHON": sys.executable,
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
                **environment,
            },
        )

    def finish(self, timeout: int = 180) -> tuple[int, str]:
        """Exit code and output; whatever still runs at the end is killed."""
        try:
            output, _ = self.process.communicate(timeout=timeout)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.returncode, output


def trainer_job(tmp_path, script, *arguments, nodes=1, tasks=2, **environment):
    options = (f"--nodes={nodes}", f"--ntasks-per-node={tasks}")
    return Job(tmp_path, script, *arguments, options=options, PYTHON=str(STAND_INS / "trainer"), **environment).finish(
        60
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def expected(config, tmp_path_factory):
    """The same run in this process."""
    run = tmp_path_factory.mktemp("expected") / "run"
    train(config, run, {"train.steps": 2})
    return records(run)


@pytest.mark.skipif(not SHELLCHECK.exists(), reason="shellcheck is not beside this Python")
def test_shellcheck_finds_nothing():
    scripts = [*SCRIPTS.iterdir(), *STAND_INS.iterdir(), *ROOT.glob("examples/**/*.sh"), ROOT / ".ci" / "run"]
    assert len(scripts) > 9
    done = subprocess.run([SHELLCHECK, "-x", *scripts], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "script", ["multi_node_srun.sbatch", pytest.param("multi_node_deepspeed.sbatch", marks=pytest.mark.full)]
)
def test_two_nodes_train(config, expected, tmp_path, script):
    options = ("--nodes=2", "--ntasks-per-node=1")
    job = Job(tmp_path, script, config, tmp_path / "run", "--train.steps", "2", options=options)
    code, output = job.finish()
    assert code == 0, output
    assert "batch 8 = 2 × 2 × 2" in output
    assert output.count("finished after 2 updates") == 1
    for step, line in records(tmp_path / "run").items():
        assert line == pytest.approx(expected[step], rel=1e-5)
    assert not list(ROOT.glob(".hostfile.*"))


@pytest.mark.slow
def test_the_dry_run_of_two_nodes(config, tmp_path):
    """Here, unlike under torchrun, the store where processes meet is in the first of them."""
    options = ("--nodes=2", "--ntasks-per-node=1")
    arguments = (config, tmp_path / "run", "--dry-run")
    code, output = Job(tmp_path, "multi_node_srun.sbatch", *arguments, options=options).finish(60)
    assert code == 0, output
    assert output.count("ok       processes: 2\n") == output.count("ready: nothing was written\n") == 1
    missing = ("--data.train=nothing", "--data.validation=null")
    code, output = Job(tmp_path, "multi_node_srun.sbatch", *arguments, *missing, options=options).finish(60)
    assert code in (2, 137), output  # 137: the task that ended last was killed because the other had ended with 2
    assert output.count("problem ") == output.count("1 problem; a run would fail\n") == 1
    assert not (tmp_path / "run").exists()


def test_tasks_get_the_cores_of_the_job(tmp_path):
    """Every script that calls srun passes --cpus-per-task on: the stand-in starts nothing otherwise."""
    environment = {**os.environ, "SLURM_CPUS_PER_TASK": "8", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1"}
    environment |= {"SLURM_JOB_NUM_NODES": "1", "STAND_IN": str(tmp_path)}
    for cores, code in (({}, 1), ({"SRUN_CPUS_PER_TASK": "8"}, 0)):
        assert subprocess.run([STAND_INS / "srun", "true"], env=environment | cores, check=False).returncode == code


def test_a_signal_to_the_tasks_requeues_the_job(tmp_path):
    run = tmp_path / "run"
    code, output = trainer_job(tmp_path, "single_node.sbatch", "c.yaml", run, "--train.steps", "5")
    assert code == 0, output
    assert output.count("stopped before its end (SIGUSR1): job") == 1
    for task in ("0", "1"):
        line = f"pretrain_mlm.py --config c.yaml --run.output_dir {run} --train.steps 5\n"
        assert (run / f"started-{task}").read_text() == 2 * line  # started again as it was started first
    assert not (run / "requeue").exists()
    environment = (run / "environment-1").read_text()
    assert "HF_HUB_OFFLINE=1" in environment
    assert "MASTER_ADDR=127.0.0.1" in environment
    assert "SLURM_LOCALID=1" in environment


def test_the_deepspeed_launcher_is_stopped_by_a_file(tmp_path):
    run = tmp_path / "run"
    code, output = trainer_job(tmp_path, "multi_node_deepspeed.sbatch", "c.yaml", run, nodes=2, tasks=1)
    assert code == 0, output
    assert output.count(f"stopped before its end (file {run}/stop): job") == 1
    first, second = (run / "started-1").read_text().splitlines()
    assert "--no_ssh --node_rank 1 --hostfile" in first
    assert "--node_rank 1" in second
    assert not list(ROOT.glob(".hostfile.*"))


@pytest.mark.parametrize("exists", [False, True])
def test_a_signal_while_the_deepspeed_launcher_imports_is_not_lost(tmp_path, exists):
    """The run's directory does not exist yet, or the ranks, which start later, take the file for a leftover."""
    run = tmp_path / "run"
    if exists:
        run.mkdir()
        (run / "config.yaml").touch()
    script, two_nodes = "multi_node_deepspeed.sbatch", {"nodes": 2, "tasks": 1}
    code, output = trainer_job(tmp_path, script, "c.yaml", run, **two_nodes, TRAINER_IMPORTS="1.5")
    assert code == 0, output
    assert output.count(f"stopped before its end (file {run}/stop): job") == 1
    assert len((run / "started-1").read_text().splitlines()) == 2
    assert not (run / "stop").exists()


def test_what_the_signal_kills_is_requeued(tmp_path):
    """A run that ends without a word, but after the signal."""
    script, two_nodes = "multi_node_deepspeed.sbatch", {"nodes": 2, "tasks": 1}
    code, output = trainer_job(tmp_path, script, "c.yaml", tmp_path / "run", **two_nodes, TRAINER_DIES="3")
    assert code == 0, output
    assert output.count("stopped before its end (after a signal, with code ") == 1
    assert len((tmp_path / "run" / "started-0").read_text().splitlines()) == 2


@pytest.mark.parametrize(("by", "words"), [("file", ": not requeued"), ("scancel", ", cancelled: not requeued")])
@pytest.mark.parametrize(("script", "nodes"), [("single_node.sbatch", 1), ("multi_node_deepspeed.sbatch", 2)])
def test_what_somebody_has_stopped_stays_stopped(tmp_path, script, nodes, by, words):
    run = tmp_path / "run"
    code, output = trainer_job(tmp_path, script, "c.yaml", run, nodes=nodes, tasks=2 // nodes, TRAINER_STOPPED=by)
    assert code == 0, output
    assert output.count("submit the job again to continue") == output.count(words) == 1, output
    assert "goes back" not in output and len((run / "started-0").read_text().splitlines()) == 1


def test_a_job_whose_time_is_up_before_it_has_stopped_is_requeued(tmp_path):
    (tmp_path / "job").write_text("JobState=COMPLETING Reason=TimeLimit")
    code, output = trainer_job(tmp_path, "single_node.sbatch", "c.yaml", tmp_path / "run")
    assert code == 0 and output.count("goes back into the queue") == 1, output
    assert len((tmp_path / "run" / "started-0").read_text().splitlines()) == 2


@pytest.mark.parametrize(("times", "expected", "starts"), [(2, 0, 2), (9, 75, 1)])
def test_an_unfinished_run_is_not_taken_for_done_when_slurm_does_not_answer(tmp_path, times, expected, starts):
    (tmp_path / "refuse").write_text("\n" * times)
    code, output = trainer_job(tmp_path, "single_node.sbatch", "c.yaml", tmp_path / "run", REQUEUE_PAUSE="0.1")
    assert code == expected, output
    assert ("could not be requeued; the run is not finished" in output) == (expected == 75)
    assert len((tmp_path / "run" / "started-0").read_text().splitlines()) == starts


@pytest.mark.parametrize("script", ["single_node.sbatch", "multi_node_srun.sbatch", "multi_node_deepspeed.sbatch"])
def test_a_failure_is_not_requeued(tmp_path, script):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "requeue").write_text("of an earlier start\n")
    code, output = trainer_job(tmp_path, script, "c.yaml", tmp_path / "run", TRAINER_FAILS="3")
    assert code in (3, 137), output  # 137: the second task was killed because the first had failed
    assert "queue" not in output
    started = list((tmp_path / "run").glob("started-*"))
    assert started
    assert all(len(path.read_text().splitlines()) == 1 for path in started)


def run_sweep(directory: Path, *options: str, python: object = sys.executable) -> tuple[str, str]:
    """Run tools/run_sweep.py on directory/sweep.yaml; returns its output and that of the elements, run by `python`."""
    environment = {
        **{name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES},
        "PATH": f"{STAND_INS}:{os.environ['PATH']}",
        "STAND_IN": str(directory),
        "JOB_ID": str(free_job_id()),
        "PYTHON": str(python),
        "OMP_NUM_THREADS": "1",
        "SBATCH_OPTIONS": "--ntasks-per-node=1",
    }
    command = [sys.executable, "tools/run_sweep.py", directory / "sweep.yaml", "--output", directory / "runs", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, done.stderr


SUBMIT = ("--slurm", "examples/slurm/sweep.sbatch")


@pytest.mark.slow
def test_a_sweep_is_an_array_of_runs(config, tmp_path):
    sweep, runs = tmp_path / "sweep.yaml", tmp_path / "runs"
    sweep.write_text(
        f"config: {config}\nseeds: [1]\nconditions:\n  base: {{sas.schedule: 0}}\n  minus: {{sas.schedule: 0.1}}\n"
    )
    steps = "--train.steps=2"
    assert run_sweep(tmp_path, *SUBMIT, steps)[0] == "submitted 1_0: base/seed-1\nsubmitted 1_1: minus/seed-1\n"
    assert run_sweep(tmp_path, "--list", steps)[0].count("finished") == 2
    for condition, weight in (("base", 0.0), ("minus", 0.1)):
        assert records(runs / condition / "seed-1")[2]["sas_weight"] == weight
    assert run_sweep(tmp_path, *SUBMIT, steps)[0] == ""  # nothing is left to do


@pytest.mark.slow
def test_an_element_keeps_its_run_when_the_sweep_file_changes(config, tmp_path):
    """While the first element trains, for the first time, its condition moves down and the next one's is removed."""
    sweep, edited, python = tmp_path / "sweep.yaml", tmp_path / "edited.yaml", tmp_path / "python"
    head = f"config: {config}\nseeds: [1]\nconditions:\n"
    sweep.write_text(f"{head}  base: {{sas.schedule: 0}}\n  minus: {{}}\n  plus: {{sas.schedule: -0.1}}\n")
    edited.write_text(f"{head}  plus: {{sas.schedule: -0.1}}\n  new: {{}}\n  base: {{sas.schedule: 0}}\n")
    python.write_text(
        f"""#!/usr/bin/env bash
[[ $1 != tools/* ]] || exec {sys.executable} "$@"
cp {edited} {sweep}
exec {STAND_INS}/trainer "$@"
"""
    )
    python.chmod(0o755)
    submitted, output = run_sweep(tmp_path, *SUBMIT, python=python)
    names = ["base/seed-1", "minus/seed-1", "plus/seed-1"]
    assert submitted == "".join(f"submitted 1_{index}: {name}\n" for index, name in enumerate(names))
    runs = tmp_path / "runs"
    assert {path.parent for path in runs.rglob("started-0")} == {runs / "base" / "seed-1", runs / "plus" / "seed-1"}
    for name, weight in (("base", "0"), ("plus", "-0.1")):
        first, requeued = (runs / name / "seed-1" / "started-0").read_text().splitlines()
        assert first == requeued and f"--sas.schedule={weight} --run.output_dir={runs / name / 'seed-1'}" in first
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert errors == [f"error: --arguments minus/seed-1: {sweep} has no such run now; --list shows those it has"]
    assert [(tmp_path / "ended" / f"1_{element}").read_text() for element in range(3)] == ["0\n", "2\n", "0\n"]


@pytest.mark.slow
def test_branches_wait_for_their_own_parent_however_it_ends(config, tmp_path):
    runs = tmp_path / "runs"
    (tmp_path / "sweep.yaml").write_text(
        f"""
config: {config}
seeds: [1, 2]
conditions:
  minus: {{sas.schedule: 0.1}}
  release: {{sas.schedule: [{{start: 0, end: 3, value: 0.1}}], run.branch_from: minus@3}}
"""
    )
    obstacle = runs / "minus" / "seed-1" / "of another program"
    obstacle.mkdir(parents=True)
    submitted, output = run_sweep(tmp_path, *SUBMIT)
    assert submitted.splitlines() == [
        "submitted 1_0: minus/seed-1",
        "submitted 1_1: minus/seed-2",
        "submitted 2_0: release/seed-1, after 1_0",
        "submitted 3_0: release/seed-2, after 1_1",
    ]
    commands = [line.split() for line in (tmp_path / "submitted").read_text().splitlines()]
    assert [command[2] for command in commands[1:]] == ["--dependency=afterany:1_0", "--dependency=afterany:1_1"]
    assert all(f"--output={runs}/logs/slurm-%A_%a.out" in command for command in commands)
    ended = {path.name: path.read_text().strip() for path in (tmp_path / "ended").iterdir()}
    assert ended == {"1_0": "2", "1_1": "0", "2_0": "2", "3_0": "0"}
    assert records(runs / "release" / "seed-2")[6]["sas_weight"] == 0
    missing = f"error: run.branch_from: {runs}/minus/seed-1/checkpoints/step_00000003: no such directory; "
    assert sum(line.startswith(missing) for line in output.splitlines()) == 1
    assert not (runs / "release" / "seed-1").exists()

    obstacle.rmdir()
    submitted, output = run_sweep(tmp_path, *SUBMIT)
    assert submitted == "submitted 4_0: minus/seed-1\nsubmitted 5_0: release/seed-1, after 4_0\n", output
    assert records(runs / "release" / "seed-1")[6]["sas_weight"] == 0


def test_array_of_shards(tmp_path):
    inputs = [tmp_path / f"part {number}.txt" for number in range(3)]
    for path in inputs:
        path.write_text("w1 w2 w3 w4\n" * 20)
    vocabulary = write_vocabulary(tmp_path / "vocab.txt")
    for index in range(2):
        job = Job(
            tmp_path / "job",
            "preprocess.sbatch",
            *(tmp_path / "packed", vocabulary, "none", *inputs),
            SLURM_ARRAY_TASK_ID=str(index),
            SLURM_ARRAY_TASK_COUNT="2",
            PREPROCESS_OPTIONS="--seq-length 16 --on-error skip",
        )
        code, output = job.finish(60)
        assert code == 0, output
        done = [path.name for path in sorted((tmp_path / "packed").glob("*.json"))]
        assert done == [f"part {number}.json" for number in range(3) if index == 1 or number != 1]


@pytest.mark.full
@pytest.mark.parametrize(
    ("script", "nodes", "reason"), [("single_node.sbatch", 1, "SIGUSR1"), ("multi_node_deepspeed.sbatch", 2, "file")]
)
def test_a_preempted_run_continues_where_it_was(config, tmp_path, script, nodes, reason):
    """The time limit comes after the third update or later; the requeued job ends where one that ran through does."""
    options = (f"--nodes={nodes}", f"--ntasks-per-node={2 // nodes}")
    run, more = tmp_path / "run", {"train.steps": 80, "checkpoint.every": 80, "evaluation.every": 80}
    arguments = [f"--{name}={value}" for name, value in more.items()]
    job = Job(tmp_path, script, config, run, *arguments, options=options)
    deadline = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists() or '"step": 3' not in (run / "metrics.jsonl").read_text():
        assert time.monotonic() < deadline and job.process.poll() is None
        time.sleep(0.05)
    (tmp_path / "time_is_up").touch()
    code, output = job.finish()
    assert code == 0, output
    assert "stopped before its end" in output and reason in output
    events = [line["event"] for line in read_records(run / "metrics.jsonl") if line["kind"] == "event"]
    assert events.count("start") == 2
    assert events[-1] == "finished"
    assert not (run / "requeue").exists()
    train(config, tmp_path / "whole", more)
    assert largest_difference(weights(run, 80), weights(tmp_path / "whole", 80)) < 1e-4
