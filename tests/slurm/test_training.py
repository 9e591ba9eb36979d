"""The batch scripts of examples/slurm on a real Slurm, training for real; and the stand-in compared with that."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import slurm_cluster
from engine_runs import free_port, largest_difference, moments, records, train, weights
from slurm_cluster import NODES, ROOT, STAND_IN, Cluster, Job, kill, wait_until
from synthetic_data import write_vocabulary

from megatron_sas.run.records import read_records

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("real_slurm")]

REAL = {"PYTHON": sys.executable}
LONG = [f"--{name}=100000" for name in ("train.steps", "train.decay_horizon", "checkpoint.every", "evaluation.every")]
"""A run that does not end by itself."""


@pytest.fixture(scope="module")
def cluster():
    with Cluster(PREEMPTION="none", SLURMD_TIMEOUT=60) as started:
        yield started


@pytest.fixture(scope="module")
def expected(config, tmp_path_factory):
    """The records of the same run in this process."""
    run = tmp_path_factory.mktemp("expected") / "run"
    train(config, run, {"train.steps": 2})
    return records(run)


@pytest.mark.parametrize("script", ["multi_node_srun.sbatch", "multi_node_deepspeed.sbatch"])
def test_two_nodes_train(cluster, config, expected, tmp_path, script):
    job = cluster.submit(script, tmp_path / "run", config, tmp_path / "run", "--train.steps=2", **REAL)
    facts = job.wait_for_end()
    output = job.output()
    assert facts["JobState"] == "COMPLETED", output
    assert "batch 8 = 2 × 2 × 2" in output and output.count("finished after 2 updates") == 1
    for step, line in records(tmp_path / "run").items():
        assert line == pytest.approx(expected[step], rel=1e-5)
    assert not list(ROOT.glob(".hostfile.*"))


def test_run_in_two_starts_equals_one_in_one_start(cluster, config, tmp_path):
    """Requeued by somebody after the second update or later."""
    more = {"train.steps": 60, "checkpoint.every": 60, "evaluation.every": 20}
    arguments = [f"--{name}={value}" for name, value in more.items()]
    job = cluster.submit(
        "single_node.sbatch",
        tmp_path / "run",
        config,
        tmp_path / "run",
        *arguments,
        options=("--ntasks-per-node=1",),
        **REAL,
    )
    job.wait_for_step(2)
    cluster.call("scontrol", "requeue", job.id)
    train(config, tmp_path / "whole", more)
    facts = job.wait_for_end()
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), job.output()
    events = [line["event"] for line in read_records(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "event"]
    assert events.count("start") == 2 and events[-1] == "finished"
    for tensors in (weights, moments):
        assert largest_difference(tensors(tmp_path / "run", 60), tensors(tmp_path / "whole", 60)) == 0
    for kind in ("train", "evaluation"):
        assert records(tmp_path / "run", kind) == records(tmp_path / "whole", kind)


def started(command: list, run, **environment: str) -> subprocess.Popen:
    """A trainer of one process, real or not."""
    return subprocess.Popen(
        [*map(str, command)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", **environment},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


@pytest.mark.parametrize("event", ["SIGTERM", "file", "port"])
def test_stand_in_does_what_the_trainer_does(config, tmp_path, event):
    """Exit code, standard error and the file `requeue` of both, for one event."""
    seen = []
    for name, command in (("real", ["pretrain_mlm.py"]), ("stand-in", [STAND_IN])):
        run = tmp_path / name
        arguments = ["--config", config, "--run.output_dir", run]
        with socket.socket() as other:
            environment = {"MASTER_PORT": str(free_port())}
            if event == "port":
                other.bind(("0.0.0.0", int(environment["MASTER_PORT"])))
                other.listen()
                environment |= {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
            more = LONG if name == "real" else ()
            process = started([sys.executable, *command, *arguments, *more], run, **environment)
            if event != "port":
                started_well = lambda run=run: '"step": 3' in text_of(run / "metrics.jsonl")  # noqa: E731
                wait_until(lambda p=process, well=started_well: p.poll() is not None or well(), "three updates")
                if event == "file":
                    (run / "stop").touch()
                else:
                    process.send_signal(signal.Signals[event])
            errors = process.communicate(timeout=120)[1].replace(str(run), "RUN")
        errors = re.sub(r"MASTER_PORT: \d+", "MASTER_PORT: N", errors)
        seen.append((process.returncode, errors, text_of(run / "requeue").replace(str(run), "RUN")))
    assert seen[0] == seen[1]


def text_of(path) -> str:
    """What a file holds; nothing without it."""
    return path.read_text() if path.exists() else ""


def test_array_of_shards_survives_the_loss_of_a_task_of_its_last_element(cluster, tmp_path):
    inputs = [tmp_path / f"part {number}.txt" for number in range(3)]
    for path in inputs:
        path.write_text("w1 w2 w3 w4\n" * 20)
    arguments = (tmp_path / "packed", write_vocabulary(tmp_path / "vocab.txt"), "none", *inputs)
    options = ("--array=0-1",)
    job = cluster.submit(
        "preprocess.sbatch", tmp_path / "job", *arguments, options=options, **REAL, PREPROCESS_OPTIONS="--seq-length 16"
    )
    tasks = wait_until(lambda: cluster.processes(job.id), "the task of the element that has the id of the array")
    last = int(next(iter(tasks.values()))["SLURM_ARRAY_TASK_ID"])
    kill(*tasks)
    ends = [job.wait_for_end(f"{job.id}_{element}") for element in range(2)]
    assert [end["JobState"] for end in ends] == ["COMPLETED"] * 2, job.output(0) + job.output(1)
    assert ends[last]["Restarts"] == "1" and ends[1 - last]["Restarts"] == "0"
    assert sorted(path.name for path in (tmp_path / "packed").glob("*.json")) == [f"part {n}.json" for n in range(3)]


@pytest.mark.parametrize("launcher", ["srun", pytest.param("deepspeed", marks=pytest.mark.full)])
def test_dry_run_of_two_nodes(cluster, config, tmp_path, launcher):
    """It prints what each rank uses; unlike under torchrun, the store where they meet is in the first of them."""
    script, arguments = f"multi_node_{launcher}.sbatch", (config, tmp_path / "run", "--dry-run")
    missing = ("--data.train=nothing", "--data.validation=null")
    good = cluster.submit(script, tmp_path / "good", *arguments, **REAL, GLOO_SOCKET_IFNAME="lo")
    bad = cluster.submit(script, tmp_path / "bad", *arguments, *missing, **REAL)
    facts, output = good.wait_for_end(), good.output()
    assert facts["JobState"] == "COMPLETED", output
    assert output.count("ok       processes: 2\n") == output.count("ready: nothing was written\n") == 1
    assert "ok       collectives: gloo, GLOO_SOCKET_IFNAME=lo\n" in output
    port = 20_000 + int(good.id) % 12_000
    place = f"{socket.gethostname()}, local rank 0, cpu, meets the others at {NODES[0]}:{port}\n"
    assert all(f"ok       rank {rank}: {place}" in output for rank in (0, 1)), output
    facts, output = bad.wait_for_end(), bad.output()
    assert (facts["ExitCode"], facts["Restarts"]) == ("2:0", "0"), output
    assert output.count("problem ") == output.count("1 problem; a run would fail\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.full
def test_run_that_cannot_be_written_is_not_started_again(cluster, config):
    """Its directory is below /proc, where not even root makes one."""
    run = Path("/proc/run")
    one = ("--ntasks-per-node=1",)
    job = cluster.submit("single_node.sbatch", config.parent / "unwritable", config, run, options=one, **REAL)
    facts, output = job.wait_for_end(), job.output()
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "2:0", "0"), output
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2 and "/proc" in errors[0] and "ended with exit code 2" in errors[1], output


SUBMIT = ("--slurm", "examples/slurm/sweep.sbatch")


def run_sweep(cluster: Cluster, directory, *options: str, python: str = sys.executable) -> list[str]:
    """Run tools/run_sweep.py on directory/sweep.yaml, and wait for the jobs it submits; returns its lines."""
    command = [sys.executable, "tools/run_sweep.py", directory / "sweep.yaml", "--output", directory / "runs", *options]
    environment = cluster.environment | {"PYTHON": python, "PATH": f"{directory}:{cluster.environment['PATH']}"}
    # The script asks for 8 tasks and 24 hours, and options before it, which the tool does not pass on, would win.
    sbatch = directory / "sbatch"
    sbatch.write_text(
        f"#!/usr/bin/env bash\nexec {shutil.which('sbatch')} --ntasks-per-node=1 --cpus-per-task=1 --gpus-per-node=1 "
        '"$@"\n'
    )
    sbatch.chmod(0o755)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    wait_until(lambda: not cluster.call("squeue", "--noheader"), "the sweep's jobs")
    return done.stdout.splitlines()


def log_of(directory, line: str) -> str:
    """What the job of a line "submitted JOB_ELEMENT: …" printed."""
    return (directory / "runs" / "logs" / f"slurm-{line.split()[1].rstrip(':')}.out").read_text()


@pytest.mark.full
def test_sweep_is_an_array_of_runs(cluster, config, tmp_path):
    (tmp_path / "sweep.yaml").write_text(
        f"config: {config}\nseeds: [1]\nconditions:\n  base: {{sas.schedule: 0}}\n  minus: {{sas.schedule: 0.1}}\n"
    )
    steps = "--train.steps=2"
    submitted = run_sweep(cluster, tmp_path, *SUBMIT, steps)
    assert [re.sub(r"\d+_", "1_", line) for line in submitted] == [
        "submitted 1_0: base/seed-1",
        "submitted 1_1: minus/seed-1",
    ]
    assert sum("finished" in line for line in run_sweep(cluster, tmp_path, "--list", steps)) == 2
    for condition, weight in (("base", 0.0), ("minus", 0.1)):
        assert records(tmp_path / "runs" / condition / "seed-1")[2]["sas_weight"] == weight
    assert run_sweep(cluster, tmp_path, *SUBMIT, steps) == []  # nothing is left to do


def test_element_keeps_its_run_when_the_sweep_file_changes(cluster, config, tmp_path):
    """When the first element trains, its condition moves down in the file and the next one's is removed."""
    sweep, edited, python = tmp_path / "sweep.yaml", tmp_path / "edited.yaml", tmp_path / "python"
    head = f"config: {config}\nseeds: [1]\nconditions:\n"
    sweep.write_text(f"{head}  base: {{sas.schedule: 0}}\n  minus: {{}}\n  plus: {{sas.schedule: -0.1}}\n")
    edited.write_text(f"{head}  plus: {{sas.schedule: -0.1}}\n  new: {{}}\n  base: {{sas.schedule: 0}}\n")
    python.write_text(
        f"""#!/usr/bin/env bash
export TRAINER_UPDATES=30 TRAINER_FAILS=0:10:-9:1
if [[ $1 == tools/* ]]; then
    # Every element but the first asks once the first trains.
    until [ "$SLURM_ARRAY_TASK_ID" = 0 ] || [ -e {tmp_path}/edited ]; do sleep 0.2; done
    exec {sys.executable} "$@"
fi
cp {edited} {sweep} && touch {tmp_path}/edited
exec {sys.executable} {STAND_IN} "$@"
"""
    )
    python.chmod(0o755)
    submitted = run_sweep(cluster, tmp_path, *SUBMIT, python=str(python))
    names = ["base/seed-1", "minus/seed-1", "plus/seed-1"]
    assert [line.partition(": ")[2] for line in submitted] == names
    runs = tmp_path / "runs"
    assert {path.parent for path in runs.rglob("started-0")} == {runs / "base" / "seed-1", runs / "plus" / "seed-1"}
    for name, weight in (("base", "0"), ("plus", "-0.1")):
        first, requeued = (start["arguments"] for start in Job(cluster, "", runs / name / "seed-1", runs).starts())
        assert first == requeued and f"--sas.schedule={weight}" in first
        assert f"--run.output_dir={runs / name / 'seed-1'}" in first
    logs = [log_of(tmp_path, line) for line in submitted]
    missing = f"error: --arguments minus/seed-1: {sweep} has no such run now; --list shows those it has\n"
    assert logs[1] == missing and all("error: --arguments" not in log for log in (logs[0], logs[2]))


@pytest.mark.full
def test_branches_wait_for_their_own_parent_however_it_ends(cluster, config, tmp_path):
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
    submitted = run_sweep(cluster, tmp_path, *SUBMIT)
    first = int(submitted[0].split()[1].partition("_")[0])
    jobs = [int(re.findall(r"submitted (\d+)_", line)[0]) for line in submitted]
    assert jobs[0] == jobs[1] == first and len(set(jobs)) == 3
    assert [line.partition(": ")[2] for line in submitted] == [
        "minus/seed-1",
        "minus/seed-2",
        f"release/seed-1, after {first}_0",
        f"release/seed-2, after {first}_1",
    ]
    assert records(runs / "release" / "seed-2")[6]["sas_weight"] == 0
    missing = f"error: run.branch_from: {runs}/minus/seed-1/checkpoints/step_00000003: no such directory; "
    assert missing in log_of(tmp_path, submitted[2])
    assert not (runs / "release" / "seed-1").exists()

    obstacle.rmdir()
    submitted = run_sweep(cluster, tmp_path, *SUBMIT)
    assert [line.partition(": ")[2].split(",")[0] for line in submitted] == ["minus/seed-1", "release/seed-1"]
    assert records(runs / "release" / "seed-1")[6]["sas_weight"] == 0


@pytest.mark.full
def test_preempted_run_of_two_nodes_continues_where_it_was(config, tmp_path):
    """Under the deepspeed launcher, by a job of a higher partition."""
    more = {"train.steps": 200, "train.decay_horizon": 1000, "checkpoint.every": 200, "evaluation.every": 200}
    arguments = [f"--{name}={value}" for name, value in more.items()]
    with Cluster() as preempting:
        run = tmp_path / "run"
        job = preempting.submit("multi_node_deepspeed.sbatch", run, config, run, *arguments, **REAL)
        job.wait_for_step(3)
        preempting.call(
            "sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 5"
        )
        facts = job.wait_for_end()
        assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), job.output()
    train(config, tmp_path / "whole", more)
    assert largest_difference(weights(run, 200), weights(tmp_path / "whole", 200)) < 1e-4


@pytest.mark.full
def test_lost_slurmstepd_ends_a_real_run(cluster, config, tmp_path):
    """The watchdog sees it: srun alone would wait for the end of the run, and then forever."""
    run = tmp_path / "run"
    job = cluster.submit("multi_node_srun.sbatch", run, config, run, *LONG, **REAL)
    job.wait_for_step(3)
    began = time.monotonic()
    kill(*{slurm_cluster.slurmstepd_of(task) for task in job.tasks(rank=1)})
    facts = job.wait()
    assert facts["Restarts"] == "1" and time.monotonic() - began < 60, job.output()
    assert "nothing was heard of task 1 on 127.0.0.2): job" in job.output()
    cluster.call("scancel", job.id)
