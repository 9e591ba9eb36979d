"""Starting real training processes for fault tests, and waiting for what they do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engine_runs import LAUNCHER_VARIABLES, ROOT, free_port, override_arguments

SUPPORT = Path(__file__).resolve().parent


def wait_until(condition: Callable[[], object], what: str, seconds: float = 180.0) -> None:
    """Poll `condition` until it holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:g} s for {what}"
        time.sleep(0.01)


def steps_done(run: Path) -> int:
    """The last update in the records, -1 without records."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return -1
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=-1)


@dataclass
class Job:
    """The ranks of one run."""

    fork_server: ForkServer
    pids: list[int]
    log: Path

    def exits(self) -> list[int | None]:
        """The exit code of each rank; None for one that runs."""
        done = self.fork_server.exits()
        return [done.get(str(pid)) for pid in self.pids]

    def send(self, number: signal.Signals, ranks: list[int] | None = None) -> None:
        """Send a signal to some ranks (default: all) that still run."""
        codes = self.exits()
        for rank, pid in enumerate(self.pids):
            if codes[rank] is None and (ranks is None or rank in ranks):
                os.kill(pid, number)

    def wait(self, seconds: float = 180.0) -> list[int]:
        """Wait until all ranks have ended."""
        try:
            wait_until(lambda: None not in self.exits(), f"the end of {self.log}", seconds)
        except AssertionError:
            self.send(signal.SIGKILL)
            raise AssertionError(f"still running after {seconds:g} s:\n{self.output()}") from None
        return self.exits()

    def wait_as_launchers_do(self, seconds: float = 180.0) -> list[int]:
        """Wait until all ranks have ended, and kill the others when one has failed."""
        wait_until(lambda: any(self.exits()) or None not in self.exits(), f"an end of {self.log}", seconds)
        time.sleep(0.2)
        self.send(signal.SIGKILL)
        return self.wait(seconds)

    def output(self) -> str:
        """What all ranks have printed."""
        return "\n".join(Path(f"{self.log}-{rank}.txt").read_text() for rank in range(len(self.pids)))


class ForkServer:
    """See fork_server.py. A context manager."""

    def __enter__(self) -> ForkServer:
        clean = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
        path = os.pathsep.join(map(str, (ROOT, SUPPORT)))
        self._process = subprocess.Popen(
            [sys.executable, SUPPORT / "fork_server.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**clean, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        )
        self._number = 0
        while '"ready"' not in (line := self._process.stdout.readline()):  # imports may print
            assert line, "the fork_server did not start"
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait()

    def start(
        self,
        config: Path,
        run: Path,
        overrides: dict | None = None,
        *,
        ranks: int = 1,
        fault: dict | None = None,
        log: Path | None = None,
        main: str = "pretrain_mlm:main",
    ) -> Job:
        """Start training in `run` with one process per rank; what it prints goes to `log`, by default next to `run`.

        `main`, module:function, is called for it.
        """
        self._number += 1
        log = log or run.with_name(f"{run.name}-log{self._number}")
        argv = ["--config", str(config), *override_arguments({**(overrides or {}), "run.output_dir": str(run)})]
        return self._start(argv, ranks, log, main, fault)

    def call(self, main: str, *arguments: object, log: Path, ranks: int = 1, expect: int = 0) -> str:
        """Call `main` (module:function) with command-line arguments to its end; returns the output."""
        job = self._start([str(argument) for argument in arguments], ranks, log, main)
        codes = job.wait(300)
        assert codes == [expect] * ranks, f"{arguments}: exit codes {codes}\n{job.output()}"
        return job.output()

    def _start(self, argv: list[str], ranks: int, log: Path, main: str, fault: dict | None = None) -> Job:
        job = {"argv": argv, "ranks": ranks, "fault": fault, "log": str(log), "port": free_port(), "main": main}
        return Job(self, self._ask({"start": job})["pids"], log)

    def train(self, config: Path, run: Path, overrides: dict | None = None, *, ranks: int = 1) -> str:
        """Train to the end; returns the output."""
        job = self.start(config, run, overrides, ranks=ranks)
        codes = job.wait()
        assert codes == [0] * ranks, f"exit codes {codes}\n{job.output()}"
        return job.output()

    def exits(self) -> dict[str, int]:
        """The exit codes of all processes that have ended, by process id."""
        return self._ask({"poll": True})["exits"]

    def _ask(self, request: dict) -> dict:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())
