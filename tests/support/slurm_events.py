"""What happens to jobs of examples/slurm on a real Slurm: each event once, with a stand-in for the trainer.

    python tests/support/slurm_events.py [--write docs/clusters.md] [--keep]

prints the table of that page, from what Slurm did, and writes it there; --keep leaves what the jobs have written.

They run at the same time, since most of their time is waiting, on as few Slurms as they can share.
"""

from __future__ import annotations

import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from slurm_cluster import NODES, Cluster, Job, can_limit_memory, kill, slurmstepd_of, wait_until

STOPPED, FAILED = "stopped before its end (", "error: the run failed ("


@dataclass
class Outcome:
    """What became of a job."""

    job: Job
    facts: dict[str, str]
    """Of `scontrol show job` after the first start."""
    seconds: float
    """From the event to the end of that start."""
    starts: int = 0
    output: str = ""
    last: dict[str, str] = field(default_factory=dict)
    """Facts after the last start."""

    @property
    def requeued(self) -> bool:
        """Whether the job went back into the queue after its first start."""
        return self.facts["Restarts"] == "1"

    def said(self) -> str:
        """The last words of the batch script about its first start."""
        lines = [line for line in self.output.splitlines() if line.startswith((STOPPED, FAILED))]
        return lines[0] if lines else ""


@dataclass(frozen=True)
class Case:
    """An event: what is done to a job, which runs until then, and what the job is."""

    title: str
    act: Callable[[Job], object]
    script: str = "multi_node_srun.sbatch"
    options: tuple[str, ...] = ()
    environment: tuple[tuple[str, object], ...] = ()
    after: int = 5
    """Updates before the event."""

    def run(self, cluster: Cluster, directory: Path, name: str) -> Outcome:
        """Submit the job, do it, and see what comes; a job that starts again is watched, then cancelled."""
        run = directory / name
        job = cluster.submit(self.script, run, "config.yaml", run, options=self.options, **dict(self.environment))
        job.wait_for_step(self.after)
        began = time.monotonic()
        self.act(job)
        facts = job.wait()
        outcome = Outcome(job, facts, time.monotonic() - began)
        if outcome.requeued:
            job.wait_for_starts(2)
            cluster.call("scancel", job.id)
        outcome.last = job.wait_for_end()
        outcome.starts, outcome.output = len(job.starts()), job.output()
        return outcome


def nothing(job: Job) -> None:
    """The event comes by itself."""


def scancel(job: Job) -> None:
    """By its owner."""
    job.cluster.call("scancel", job.id)


def requeue(job: Job) -> None:
    """By an administrator or the owner."""
    job.cluster.call("scontrol", "requeue", job.id)


def kill_task(job: Job) -> None:
    """SIGKILL of the second task."""
    kill(*job.tasks(rank=1))


def kill_slurmstepd(job: Job) -> None:
    """SIGKILL of the slurmstepd of the second task, which then ends itself."""
    kill(*{slurmstepd_of(task) for task in job.tasks(rank=1)})


def touch_stop(job: Job) -> None:
    """By a user."""
    (job.run / "stop").touch()


def signal_while_importing(job: Job) -> None:
    """The notice of the time limit comes while launchers and ranks import."""
    wait_until(job.tasks, "the tasks")
    job.cluster.call("scancel", "--batch", "--signal=USR1", job.id)


def signal_while_importing_again(job: Job) -> None:
    """The same where the run's directory exists: the ranks, which begin later, take the file `stop` for a leftover."""
    job.run.mkdir()
    (job.run / "config.yaml").touch()
    signal_while_importing(job)


def preempted(job: Job) -> None:
    """Wait until Slurm preempts it: the cases of a cluster are preempted by one job, see `preempt`."""
    wait_until(lambda: (job.cluster.directory / "preempted").exists(), "the job of the partition high")


def preempted_and_cancelled(job: Job) -> None:
    """Cancel it in the grace time."""
    preempted(job)
    wait_until(lambda: job.facts()["PreemptTime"] != "None", "preemption")
    scancel(job)


SRUN, DEEPSPEED, ONE_NODE = "multi_node_srun.sbatch", "multi_node_deepspeed.sbatch", "single_node.sbatch"
LONG_SAVE = (("TRAINER_SAVES", 3),)
IMPORTS = (("TRAINER_IMPORTS", 2),)


def fails(code: int, update: int = 5, rank: int = 1, **more: object) -> dict:
    """The second task ends with a code, or by a signal, at an update."""
    return {"environment": (("TRAINER_FAILS", f"{rank}:{update}:{code}"), *more.items()), "act": nothing, "after": 1}


PLAIN = {
    "scancel": Case("`scancel`", scancel),
    "scancel-deepspeed": Case("`scancel`, deepspeed", scancel, DEEPSPEED),
    "scancel-long": Case("`scancel`, saving takes 3 s", scancel, ONE_NODE, environment=LONG_SAVE),
    "requeue": Case("`scontrol requeue` by somebody", requeue, environment=LONG_SAVE),
    "stop-file": Case("the file `RUN/stop`", touch_stop),
    "time-limit": Case("time limit, notice of 30 s", nothing, ONE_NODE, ("--time=1", "--signal=USR1@30")),
    "time-limit-deepspeed": Case(
        "time limit, notice of 30 s, deepspeed", nothing, DEEPSPEED, ("--time=1", "--signal=B:USR1@30")
    ),
    "no-requeue": Case("time limit, `--no-requeue`", nothing, SRUN, ("--time=1", "--signal=USR1@30", "--no-requeue")),
    "unlimited": Case("`scancel`, no time limit", scancel, ONE_NODE, ("--time=UNLIMITED", "--cpus-per-task=2")),
    "stop-file-deepspeed": Case("the file `RUN/stop`, deepspeed", touch_stop, DEEPSPEED),
    "importing": Case("notice while importing, deepspeed", signal_while_importing, DEEPSPEED, (), IMPORTS, 0),
    "importing-again": Case("the same, of a run that exists", signal_while_importing_again, DEEPSPEED, (), IMPORTS, 0),
    "kill-task": Case("`kill -9` of a task", kill_task),
    "kill-task-waits": Case("`kill -9` of a task, the others hang", kill_task, environment=(("TRAINER_WAITS", 1),)),
    "kill-slurmstepd": Case("`kill -9` of a slurmstepd", kill_slurmstepd),
    "fault-1": Case("exit code 1 of a task", **fails(1)),
    "fault-2": Case("exit code 2 of a task", **fails(2)),
    "fault-2-waits": Case("exit code 2 of a task, the others hang", **fails(2, TRAINER_WAITS=1)),
    "watchdog": Case("exit code 3 of a task (watchdog)", **fails(3, TRAINER_WAITS=1)),
    "max-restarts": Case("`kill -9`, `MAX_RESTARTS=0`", kill_task, environment=(("MAX_RESTARTS", 0),)),
}
"""On a Slurm without preemption, its default."""

REPEATS = Case("death by SIGSEGV, twice at the same update", **fails(-signal.SIGSEGV, 20))
MEMORY = Case("a task runs out of memory, twice", options=("--mem-per-cpu=150M",), **fails(0))
PREEMPTION = {
    "scancel-preemptible": Case("`scancel`, preemption possible", scancel),
    "grace": Case("preempted, grace time 20 s", preempted, options=("--partition=low",)),
    "grace-deepspeed": Case("preempted, grace time 20 s, deepspeed", preempted, DEEPSPEED, ("--partition=low",)),
    "no-grace": Case("preempted, grace time 0", preempted, SRUN, ("--partition=nograce",), LONG_SAVE),
    "cancel": Case("preempted, `PreemptMode=CANCEL`", preempted, options=("--partition=cancel",)),
    "grace-scancel": Case(
        "`scancel` in the grace time", preempted_and_cancelled, SRUN, ("--partition=low",), LONG_SAVE
    ),
}
"""On one that preempts by partition; one job of a higher partition preempts those that wait for it."""


NODE_TITLES = {
    "node": "a node lost for 40 s, `SlurmdTimeout=15`",
    "node-first": "the same with `SLURM_WAIT=5`: the script is first",
}


def attempt(what: Callable[..., Outcome], cluster: Cluster, *arguments: object, **more: object) -> Outcome | str:
    """Do it; if it fails, return the traceback and what Slurm shows."""
    try:
        return what(cluster, *arguments, **more)
    except Exception:
        jobs = cluster.call("scontrol", "--oneliner", "show", "job")
        return f"{traceback.format_exc()}{jobs}{cluster.call('sinfo', '--Node', '--long')}"


def run_cases(cluster: Cluster, cases: dict[str, Case], directory: Path) -> dict[str, Outcome | str]:
    """Run the cases at the same time; of one that fails, the traceback."""

    with ThreadPoolExecutor(len(cases) + 1) as pool:
        running = {name: pool.submit(attempt, case.run, cluster, directory, name) for name, case in cases.items()}
        if cases is PREEMPTION:
            pool.submit(preempt, cluster, [name for name in cases if name != "scancel-preemptible"], directory).result()
        return {name: future.result() for name, future in running.items()}


def preempt(cluster: Cluster, names: list[str], directory: Path) -> None:
    """Submit a job that preempts all others, once all of them train."""
    jobs = [Job(cluster, name, directory / name, directory) for name in names]
    wait_until(lambda: all(job.step() >= 8 for job in jobs), "jobs to preempt")
    time.sleep(1)  # each case has seen its fifth update
    whole = ("--partition=high", "--nodes=2", "--exclusive", "--time=1", "--output=/dev/null")
    cluster.call("sbatch", *whole, "--wrap=sleep 8")
    (cluster.directory / "preempted").touch()


def repeated_failure(cluster: Cluster, directory: Path, name: str = "repeats", case: Case = REPEATS) -> Outcome:
    """A task dies in the same way in the first two starts."""
    run = directory / name
    job = cluster.submit(SRUN, run, "config.yaml", run, options=case.options, **dict(case.environment))
    facts = job.wait_for_end()
    time.sleep(1)
    return Outcome(job, facts, 0, len(job.starts()), job.output(), facts)


def taken_port(cluster: Cluster, directory: Path) -> Outcome:
    """Another program listens on the job's MASTER_PORT."""
    run = directory / "taken-port"
    job = cluster.submit(SRUN, run, "config.yaml", run, options=("--hold",), TRAINER_UPDATES=5)
    with socket.create_server((NODES[0], 20_000 + int(job.id) % 12_000)):
        cluster.call("scontrol", "release", job.id)
        facts = job.wait_for_end()
    return Outcome(job, facts, 0, len(job.starts()), job.output())


def last_of_an_array(cluster: Cluster, directory: Path) -> Outcome:
    """A sweep's last element, whose job id is that of the array, loses a task; the other element is not affected."""
    from engine_runs import write_inputs

    inputs = directory / "sweep-inputs"
    inputs.mkdir()
    sweep = inputs / "sweep.yaml"
    sweep.write_text(f"config: {write_inputs(inputs)}\nseeds: [1, 2]\nconditions: {{base: {{}}}}\n")
    runs = directory / "sweep"
    names = "base/seed-1,base/seed-2"
    job = cluster.submit("sweep.sbatch", runs, sweep, runs, names, options=("--array=0-1",), TRAINER_UPDATES=60)
    first, last = (Job(cluster, f"{job.id}_{i}", runs / "base" / f"seed-{i + 1}", job.output_path) for i in (0, 1))
    wait_until(lambda: "finished after" in job.output(0) or last.step() >= 30, "the array")
    last.wait_for_step(30)
    id = last.facts()["JobId"]
    assert id == job.id, "the last element has another id"
    began = time.monotonic()
    kill(*last.tasks(rank=1, id=id))
    facts = last.wait()
    outcome = Outcome(last, facts, time.monotonic() - began)
    outcome.last, ended = last.wait_for_end(), first.wait_for_end()
    assert (ended["JobState"], ended["Restarts"], len(first.starts())) == ("COMPLETED", "0", 1), ended
    outcome.starts, outcome.output = len(last.starts()), job.output(1)
    return outcome


def lost_node(cluster: Cluster, directory: Path, name: str, **environment: object) -> Outcome:
    """The second node is gone for 40 s; the job may start once in vain, see docs/clusters.md."""
    run = directory / name
    job = cluster.submit(SRUN, run, "config.yaml", run, **environment)
    job.wait_for_step(5)
    began = time.monotonic()
    cluster.lose_node(NODES[1])
    wait_until(lambda: job.facts()["Restarts"] != "0", "the job's return")
    outcome = Outcome(job, job.facts(), time.monotonic() - began)
    time.sleep(max(0, began + 40 - time.monotonic()))
    cluster.bring_back(NODES[1])
    job.wait_for_starts(2, more=30)
    cluster.call("scancel", job.id)
    outcome.last = job.wait_for_end()
    outcome.starts, outcome.output = len(job.starts()), job.output()
    return outcome


def plain_events(directory: Path) -> dict[str, Outcome | str]:
    """All that happens on a Slurm without preemption, which waits long for a silent node."""
    with Cluster(PREEMPTION="none", SLURMD_TIMEOUT=300) as cluster, ThreadPoolExecutor() as pool:
        others = {"repeats": repeated_failure, "taken-port": taken_port, "array-last": last_of_an_array}
        running = {name: pool.submit(attempt, what, cluster, directory) for name, what in others.items()}
        return run_cases(cluster, PLAIN, directory) | {name: one.result() for name, one in running.items()}


def preemption_events(directory: Path) -> dict[str, Outcome | str]:
    """All that happens where partitions preempt."""
    with Cluster(SLURMD_TIMEOUT=15) as cluster:
        return run_cases(cluster, PREEMPTION, directory)


def node_events(directory: Path) -> dict[str, Outcome | str]:
    """The loss of a node, which disturbs whatever else its Slurm does. Slurm notices first, or the job does."""

    def lose(name: str, wait: int) -> Outcome | str:
        with Cluster(SLURMD_TIMEOUT=15) as cluster:
            return attempt(lost_node, cluster, directory, name, SLURM_WAIT=wait)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(NODE_TITLES, pool.map(lose, NODE_TITLES, (15, 5)), strict=True))


def memory_event(directory: Path) -> dict[str, Outcome | str]:
    """A kill for lack of memory, where this machine can make one and a Slurm that does starts."""
    if not can_limit_memory():
        return {}
    with ExitStack() as stack:
        try:
            cluster = stack.enter_context(Cluster(LIMIT_MEMORY="yes"))
        except AssertionError as error:
            print(f"no kill for lack of memory: {error}", file=sys.stderr)
            return {}
        return {"memory": attempt(repeated_failure, cluster, directory, "memory", MEMORY)}


def all_events(directory: Path) -> dict[str, Outcome | str]:
    """What happens on all of these, at the same time."""
    kinds = (plain_events, preemption_events, memory_event, node_events)
    with ThreadPoolExecutor(len(kinds)) as pool:
        running = [pool.submit(events, directory) for events in kinds]
        return {name: outcome for events in running for name, outcome in events.result().items()}


LONG_WORDS = (
    ("; submit the job again to continue", ""),
    (": see the messages above; the job does not start again by itself", ""),
)


def table(outcomes: dict[str, Outcome | str]) -> str:
    """Markdown: what Slurm and the scripts did."""
    titles = {name: case.title for name, case in (PLAIN | PREEMPTION).items()}
    titles |= {"repeats": REPEATS.title, "memory": MEMORY.title, **NODE_TITLES}
    titles |= {"taken-port": "`MASTER_PORT` is taken", "array-last": "`kill -9` of a task of an array's last element"}
    lines = ["| Event | The job then | Ends after | Exit code | The script says |", "|---|---|---:|---:|---|"]
    for name, outcome in outcomes.items():
        if isinstance(outcome, str):
            error = next(line for line in outcome.splitlines() if "Error" in line)
            lines.append(f"| {titles[name]} | {error} | | | |")
            continue
        state, said = outcome.facts, outcome.said()
        then = "back in the queue" if outcome.requeued else state["JobState"]
        if name in ("repeats", "memory"):
            then, state = "back in the queue, then FAILED", outcome.last
            said = next((line for line in outcome.output.splitlines() if line.startswith(FAILED)), "")
        for words, short in ((str(outcome.job.run), "RUN"), (f"job {outcome.job.id} ", "job JOB "), *LONG_WORDS):
            said = said.replace(words, short)
        code = "" if then == "back in the queue" else state["ExitCode"].partition(":")[0]
        seconds = f"{outcome.seconds:.0f} s" if outcome.seconds else ""
        lines.append(f"| {titles[name]} | {then} | {seconds} | {code} | {said} |")
    return "\n".join(lines)


def main() -> int:
    """The command line."""
    place = Path(tempfile.mkdtemp(prefix="events-"))
    outcomes = all_events(place)
    print(table(outcomes))
    for failed in (outcome for outcome in outcomes.values() if isinstance(outcome, str)):
        print(failed, file=sys.stderr)
    if "--write" in sys.argv:
        page = Path(sys.argv[sys.argv.index("--write") + 1])
        before, rest = page.read_text().split("<!-- events -->\n")
        after = rest[rest.index("<!-- end -->") :]
        page.write_text(f"{before}<!-- events -->\n{table(outcomes)}\n{after}")
    if "--keep" in sys.argv:
        print(place)
    else:
        shutil.rmtree(place)
    return any(isinstance(outcome, str) for outcome in outcomes.values())


if __name__ == "__main__":
    sys.exit(main())
