#!/usr/bin/env python3
"""One run of two nodes through random events on a real Slurm; its weights must equal those of an undisturbed run.

    python tests/slurm/soak.py --events 20 --seed 1 --output soak.json

An event comes at a random moment of a start, half of them before its first update: `scancel` and another submission,
`scontrol requeue`, a preemption, SIGKILL of a task or of a slurmstepd, or the loss of a node that is back after some
seconds. The last comes after an update: before all ranks have met, nobody misses one for half an hour.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from engine_runs import largest_difference, moments, override_arguments, records, weights, write_inputs  # noqa: E402
from slurm_cluster import NODES, Cluster, Job, kill, slurmstepd_of, wait_until  # noqa: E402

from megatron_sas.core.benchmark import describe_device  # noqa: E402

SCRIPT = "multi_node_srun.sbatch"
EVENTS = ("scancel", "requeue", "preemption", "node", "task", "slurmstepd")


def settings(steps: int) -> list[str]:
    """A run with a checkpoint every 8 updates."""
    more = {"train.steps": steps, "train.decay_horizon": 100_000, "checkpoint.every": 8, "checkpoint.keep_last": 2}
    return override_arguments({**more, "evaluation.every": 100, "logging.every": 2})


def submit(cluster: Cluster, config: Path, run: Path, steps: int) -> Job:
    """The job, which may lose much."""
    environment = {"PYTHON": sys.executable, "MAX_RESTARTS": 1000, "SLURM_WAIT": 5}
    return cluster.submit(SCRIPT, run, config, run, *settings(steps), options=("--time=UNLIMITED",), **environment)


def runs(job: Job) -> bool:
    """Whether it does; raises AssertionError if it never will again."""
    state = job.facts()["JobState"]
    assert state in ("PENDING", "CONFIGURING", "RUNNING"), job.output()
    return state == "RUNNING"


def happen(cluster: Cluster, job: Job, event: str) -> None:
    """Do it."""
    if event == "requeue":
        cluster.call("scontrol", "requeue", job.id)
    elif event == "preemption":
        cluster.call("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 3")
    elif event == "node":
        cluster.lose_node(NODES[1])
        time.sleep(3)
        cluster.bring_back(NODES[1])
    elif event == "task":
        kill(*job.tasks(rank=1))
    elif event == "slurmstepd":
        kill(*{slurmstepd_of(task) for task in job.tasks(rank=1)})
    else:
        cluster.call("scancel", job.id)


def soak(directory: Path, events: int, seed: int, say: Callable[[str], None]) -> dict:
    """Run; raises AssertionError at the first thing that is not as it should be. Returns what happened."""
    chance, happened, began = random.Random(seed), Counter(), time.monotonic()
    config, run, whole = write_inputs(directory), directory / "run", directory / "whole"
    with Cluster(KILL_WAIT=3) as cluster:
        steps = 100_000  # more than there is time for; the length is set when all has happened
        job = submit(cluster, config, run, steps)
        for number in range(1, events + 1):
            event, early = chance.choice(EVENTS), chance.random() < 0.5
            early &= number > 1 and event != "node"
            wait_until(lambda job=job: runs(job) and job.tasks(0) and job.tasks(1), "a start")
            if not early:
                begun = len(job.output())
                wait_until(lambda job=job, n=begun: runs(job) and "\nstep " in job.output()[n:], "an update")
            time.sleep(chance.uniform(0, 4))
            assert runs(job), job.output()
            step, restarts = job.step(), int(job.facts()["Restarts"])
            (run / "losses").unlink(missing_ok=True)  # two at the same update by chance are no fault of the program
            happen(cluster, job, event)
            happened[event] += 1
            if event == "scancel":
                facts = job.wait_for_end()
                assert facts["JobState"] == "CANCELLED" and int(facts["Restarts"]) == restarts, job.output()
                job = submit(cluster, config, run, steps)
            else:
                facts = job.wait()
                assert facts["JobState"] == "PENDING" and int(facts["Restarts"]) == restarts + 1, job.output()
            say(f"{number}: {event} at update {step}{', or before its start made one' * early}")
        cluster.call("scancel", job.id)
        job.wait_for_end()
        steps = (job.step() // 8 + 2) * 8
        jobs = [submit(cluster, config, place, steps) for place in (run, whole)]
        for one in jobs:
            facts = one.wait_for_end(seconds=900)
            assert facts["JobState"] == "COMPLETED", one.output()
    differences = [largest_difference(tensors(run, steps), tensors(whole, steps)) for tensors in (weights, moments)]
    assert differences == [0, 0], f"weights and moments differ by {differences}"
    assert records(run) == records(whole)
    place = {"date": time.strftime("%Y-%m-%d", time.gmtime()), "device": describe_device(torch.device("cpu"))}
    seconds = round(time.monotonic() - began)
    return {"seed": seed, **place, "events": dict(happened), "updates": steps, "seconds": seconds}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=20, help="how many (20)")
    parser.add_argument("--seed", type=int, default=1, help="of the moments and events (1)")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        text = json.dumps(soak(Path(directory), arguments.events, arguments.seed, partial(print, flush=True)), indent=2)
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
