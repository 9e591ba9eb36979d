"""A real Slurm of two nodes for tests (tests/slurm/cluster.sh), and what tests do to its jobs."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "examples" / "slurm"
CLUSTER = ROOT / "tests" / "slurm" / "cluster.sh"
STAND_IN = ROOT / "tests" / "slurm" / "trainer"
NODES = ("127.0.0.1", "127.0.0.2")
PATIENCE = 180.0  # seconds for what takes few on an idle machine
LATEST = 0.4  # seconds for which an answer of Slurm about all jobs serves the cases that run at the same time

FROM_OUTSIDE = ("SLURM_", "SRUN_", "SBATCH_", "TRAINER_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")


def missing() -> str | None:
    """Why there can be no Slurm here; None if there can. One is started to find out."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    absent = [name for name in ("slurmctld", "slurmd", "munged", "sbatch", "srun") if not shutil.which(name, path=path)]
    if absent:
        return f"no Slurm here ({', '.join(absent)} not in PATH): apt-get install slurm-wlm munge"
    try:
        with Cluster():
            return None
    except AssertionError as error:
        return f"Slurm does not start here: {' '.join(str(error).split())}"


def wait_until(condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> object:
    """Wait for `condition` to hold, and return what it returned."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s in vain for {what}"
        time.sleep(0.4)
    return value


class Cluster:
    """A context manager; `settings` are the variables of `cluster.sh start`."""

    def __init__(self, **settings: object) -> None:
        self._settings = {name: str(value) for name, value in settings.items()}
        self.directory = Path(tempfile.mkdtemp(prefix="slurm-"))  # a short name: it holds sockets
        clean = {name: value for name, value in os.environ.items() if not name.startswith(FROM_OUTSIDE)}
        self.environment = clean | {
            "PATH": f"{clean['PATH']}:/usr/sbin:/sbin",
            "SLURM_CONF": str(self.directory / "slurm.conf"),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support'}",
            "REQUEUE_PAUSE": "1",
        }
        self._jobs, self._asked, self._asking = [], 0.0, threading.Lock()
        self.stand_in = self._interpreter("stand-in", f'exec "{sys.executable}" "{STAND_IN}" "$@"')

    def _interpreter(self, name: str, command: str) -> str:
        """A script for PYTHON that runs tools as they are, and `command` for all else."""
        path = self.directory / name
        path.write_text(f'#!/usr/bin/env bash\n[[ ${{1-}} != tools/* ]] || exec "{sys.executable}" "$@"\n{command}\n')
        path.chmod(0o755)
        return str(path)

    def __enter__(self) -> Cluster:
        for _ in range(2):  # with new ports: another program may have taken one before Slurm did
            done = subprocess.run(
                [CLUSTER, "start", self.directory],
                env=self.environment | self._settings,
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode == 0:
                return self
        self.__exit__()
        raise AssertionError(done.stderr)

    def __exit__(self, *_: object) -> None:
        subprocess.run([CLUSTER, "stop", self.directory], env=self.environment, check=False)
        shutil.rmtree(self.directory, ignore_errors=True)

    def call(self, *command: object, check: bool = True) -> str:
        """Run one of Slurm's commands and return what it printed."""
        done = subprocess.run(
            list(map(str, command)), env=self.environment, cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def facts(self, id: str) -> dict[str, str]:
        """What `scontrol show job` says of a job, or of an element of an array (`12_3`), by name.

        Not older than LATEST. Empty where Slurm does not know the job.
        """
        job, _, element = id.partition("_")
        names = {"ArrayJobId": job, "ArrayTaskId": element} if element else {"JobId": job}
        with self._asking:
            for fresh in (False, True):
                if fresh or time.monotonic() - self._asked > LATEST:
                    lines = self.call("scontrol", "--oneliner", "show", "job", check=False).splitlines()
                    self._jobs, self._asked = (
                        [dict(re.findall(r"(\w+)=(\S*)", line)) for line in lines],
                        time.monotonic(),
                    )
                for facts in self._jobs:
                    if names.items() <= facts.items():
                        return facts
        return {}

    def submit(self, script: str, run: Path, *arguments: object, options: tuple = (), **environment: object) -> Job:
        """Submit one of examples/slurm: by default two tasks on two nodes, of the stand-in for the trainer."""
        run.parent.mkdir(parents=True, exist_ok=True)
        output = (
            run.parent / f"{run.name}-%a.out"
            if any("--array" in o for o in options)
            else run.parent / f"{run.name}.out"
        )
        one_node = script in ("single_node.sbatch", "sweep.sbatch", "preprocess.sbatch")
        shape = ("--nodes=1", "--ntasks-per-node=2") if one_node else ("--nodes=2", "--ntasks-per-node=1")
        if script == "preprocess.sbatch":
            shape = ("--nodes=1", "--ntasks-per-node=1")
        defaults = (*shape, "--cpus-per-task=1", "--gpus-per-node=1", "--time=20")
        command = ["sbatch", "--parsable", f"--output={output}", *defaults, *options, SCRIPTS / script, *arguments]
        variables = {"PYTHON": self.stand_in, **{name: str(value) for name, value in environment.items()}}
        done = subprocess.run(
            list(map(str, command)),
            env=self.environment | variables,
            cwd=ROOT,  # submitted from the repository's root, as the scripts say
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return Job(self, done.stdout.strip().split(";")[0], run, output)

    def processes(self, job: str, node: str | None = None) -> dict[int, dict[str, str]]:
        """The processes of the tasks of a job (an id, or `%` for all jobs) on a node, with their environments."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                pairs = (entry.partition(b"=") for entry in path.read_bytes().split(b"\0"))
                variables = {name.decode(): value.decode(errors="replace") for name, _, value in pairs}
                ours = variables.get("SLURM_CONF") == self.environment["SLURM_CONF"]
                if not ours or "SLURM_STEP_ID" not in variables or "SLURMD_NODENAME" not in variables:
                    continue
                if job in ("%", variables["SLURM_JOB_ID"]) and node in (None, variables["SLURMD_NODENAME"]):
                    found[int(path.parent.name)] = variables
        return found

    def lose_node(self, node: str) -> None:
        """Kill slurmd, slurmstepd and tasks there, as a loss of power does."""
        tasks = self.processes("%", node)
        victims = [int((self.directory / f"slurmd-{node}.pid").read_text()), *map(slurmstepd_of, tasks), *tasks]
        kill(*victims)

    def bring_back(self, node: str) -> None:
        """Start the slurmd of a node that was lost."""
        subprocess.run([CLUSTER, "node", self.directory, node], env=self.environment, check=True)


def can_limit_memory() -> bool:
    """Whether `LIMIT_MEMORY=yes` works here: this user makes memory cgroups, of version 1."""
    memory = Path("/sys/fs/cgroup/memory")
    return os.access(memory, os.W_OK) and (memory / "memory.memsw.limit_in_bytes").exists()  # Slurm limits swap too


def slurmstepd_of(process: int) -> int:
    """The nearest slurmstepd above a process."""
    while process > 1:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        process = int(fields[1])
        if Path(f"/proc/{process}/comm").read_text().strip() == "slurmstepd":
            return process
    raise AssertionError("no slurmstepd above the process")


def kill(*processes: int) -> None:
    """SIGKILL, for those that are still there."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


@dataclass
class Job:
    """A submitted job, or array."""

    cluster: Cluster
    id: str
    run: Path
    output_path: Path

    def facts(self, id: str | None = None) -> dict[str, str]:
        """See `Cluster.facts`."""
        return self.cluster.facts(id or self.id)

    def output(self, element: int | None = None) -> str:
        """What the job has printed."""
        path = Path(str(self.output_path).replace("%a", str(element)))
        return path.read_text(errors="replace") if path.exists() else ""

    def starts(self, rank: int = 0) -> list[dict]:
        """What the starts of the stand-in noted."""
        path = self.run / f"started-{rank}"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def step(self) -> int:
        """The newest update in the records."""
        path = self.run / "metrics.jsonl"
        steps = re.findall(r'"step": (\d+)', path.read_text()) if path.exists() else []
        return int(steps[-1]) if steps else 0

    def wait_for_step(self, step: int) -> None:
        """Wait until that many updates are done."""

        def done() -> bool:
            assert self.facts().get("JobState") not in ("FAILED", "CANCELLED"), self.output()
            return self.step() >= step

        wait_until(done, f"update {step} of job {self.id}")

    def wait_for_starts(self, number: int, more: int = 5) -> None:
        """Wait for the start of that number, and for some updates of it."""
        wait_until(lambda: len(self.starts()) >= number, f"start {number} of job {self.id}")
        self.wait_for_step(self.starts()[number - 1]["step"] + more)

    def ended(self, id: str | None = None) -> dict[str, str] | None:
        """The job's facts when it has ended or waits for another start; None while it runs."""
        facts = self.facts(id)
        return None if facts.get("JobState") in ("RUNNING", "SIGNALING", "COMPLETING", "CONFIGURING") else facts

    def wait(self, id: str | None = None) -> dict[str, str]:
        """Wait for the end of this start and return the facts."""
        return wait_until(lambda: self.ended(id), f"the end of job {id or self.id}: {self.output()}")

    def wait_for_end(self, id: str | None = None, seconds: float = PATIENCE) -> dict[str, str]:
        """Wait for the end of the last start and return the facts."""
        over = lambda: (found := self.ended(id)) and found["JobState"] != "PENDING" and found  # noqa: E731
        return wait_until(over, f"the last end of job {id or self.id}: {self.output()}", seconds)

    def tasks(self, rank: int | None = None, id: str | None = None) -> list[int]:
        """The processes of its tasks that are the stand-in, of one rank or all."""
        found = self.cluster.processes(id or self.id)
        return [process for process, env in found.items() if rank is None or env.get("SLURM_PROCID") == str(rank)]
