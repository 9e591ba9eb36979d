"""What a dry run found, on all hosts: each process tells the others its problems, and the first prints them."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_sas.core.cli import InputError, first_line
from megatron_sas.launch.environment import environment_from_launcher, number_of_processes
from megatron_sas.run.signals import rank_by_launcher

Result = TypeVar("Result")

GRACE_SECONDS = 10.0
"""How long a process may take to fail by itself after another has failed."""


class Report:
    """One line per check of the first process, and one per problem of the others.

    The processes exchange problems through the key-value store at MASTER_ADDR and not with collectives, which need the
    very GPUs and networks that are checked here.
    """

    def __init__(self) -> None:
        self.rank = rank_by_launcher()
        self.where = f"{socket.gethostname()} (rank {self.rank})"
        self.timeout = timedelta(minutes=30)  # for a process to come, which may read slowly
        self._problems: list[str] = []  # of this process, since they were last exchanged
        self._count = 0  # that were printed
        self._exchanges = 0
        self._store: dist.Store | None = None  # None: a single process, or one that cannot reach the others

    def join(self) -> None:
        """Reach the other processes, if there are any."""

        def connect() -> int:
            environment_from_launcher()
            self.rank = int(os.environ.get("RANK", "0"))
            self.where = f"{socket.gethostname()} (rank {self.rank})"
            if number_of_processes() > 1:
                self._store = self._connect()
            return number_of_processes()

        self.check("processes", connect)

    def check(self, name: str, action: Callable[[], Result], describe: Callable[[Result], Any] = str) -> Result | None:
        """Run `action` and report what it found; None when it raised."""
        try:
            result = action()
        except (InputError, OSError) as error:
            self.problem(f"{name}: {error}")
            return None
        if self.rank == 0:
            print(f"ok       {name}: {describe(result)}", flush=True)
        return result

    def problem(self, line: str) -> None:
        """Report a problem that was found in another way than by `check`."""
        self._problems.append(line)
        self._count += 1
        if self.rank == 0:
            print(f"problem  {line}", flush=True)

    def warn(self, line: str) -> None:
        """Report what does not keep a run from starting."""
        if self.rank == 0:
            print(f"warning  {line}", flush=True)

    def agree(self) -> bool:
        """Tell each other the problems since the last time; whether there were none, the same on all processes."""
        own = self._problems
        if self._store is None:
            self._problems = []
            return not own
        keys = [f"{self._exchanges}/{rank}" for rank in range(number_of_processes())]
        try:
            self._publish()
            with contextlib.suppress(dist.DistStoreError):  # who did not come is found below
                self._store.wait(keys, self.timeout)
            found = [json.loads(self._store.get(key)) if self._store.check([key]) else None for key in keys]
        except RuntimeError as error:
            print(f"problem  {self.where}: processes: lost contact with the first ({first_line(error)})", flush=True)
            self._store = None
            return False
        self._exchanges += 1
        self._problems = []
        others = _of_others(found)
        if self.rank == 0:
            for line in others:
                self._count += 1
                print(f"problem  {line}", flush=True)
        return not own and not others and not (found[0] or {}).get("problems")

    @contextlib.contextmanager
    def all_or_none(self) -> Iterator[None]:
        """For a block with collectives, before `agree`: when a process reports a problem in it, none waits for long.

        One that is still in the block some seconds later waits in a collective that nobody else will join. It ends.
        """
        if self._store is None:
            yield
            return
        done = threading.Event()
        threading.Thread(target=self._watch, args=(done,), daemon=True).start()
        try:
            yield
        finally:
            done.set()
        if self._problems:
            self._publish()
            self._store.set("failed", "")

    def fail(self) -> int:
        """Say that a run would fail; returns the exit code."""
        if self.rank == 0:
            problems = f"{self._count} problem{'s' if self._count > 1 else ''}"
            print(f"{problems}; a run would fail", file=sys.stderr, flush=True)
        self.leave()
        return 2

    def leave(self) -> None:
        """Part once the first has spoken: a launcher that sees a process end stops the others."""
        if self._store is None:
            if self.rank > 0:
                time.sleep(2)
            return
        with contextlib.suppress(RuntimeError):  # whoever is gone has heard enough
            if self.rank > 0:
                self._store.wait(["spoken"], timedelta(seconds=3 * GRACE_SECONDS))
                self._store.add("left", 1)
                return
            self._store.set("spoken", "")
            deadline = time.monotonic() + GRACE_SECONDS
            while self._store.add("left", 0) < number_of_processes() - 1 and time.monotonic() < deadline:
                time.sleep(0.05)  # the store is ours and ends with us

    def _connect(self) -> dist.Store:
        try:
            store, *_ = next(dist.rendezvous("env://", timeout=self.timeout))
        except (RuntimeError, ValueError) as error:
            place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            message = (
                f"cannot meet the others at {place} ({first_line(error)}); is MASTER_ADDR the first host, and "
                "MASTER_PORT free there and open to the others?"
            )
            if self.rank > 0:  # the first will not hear of it
                print(f"problem  {self.where}: processes: {message}", flush=True)
            raise InputError(message) from None
        return dist.PrefixStore("dry run", store)

    def _publish(self) -> None:
        device = "a GPU" if torch.cuda.is_available() else "no GPU"
        words = {"where": self.where, "device": device, "problems": self._problems}
        self._store.set(f"{self._exchanges}/{self.rank}", json.dumps(words))

    def _watch(self, done: threading.Event) -> None:
        """A thread, which leaves the main one stuck in its collective."""
        with contextlib.suppress(RuntimeError):  # without the store nobody can be told anything
            while not done.wait(0.5):
                if self._store.check(["failed"]) and not done.wait(GRACE_SECONDS):
                    self.agree()
                    code = self.fail()
                    sys.stdout.flush()
                    os._exit(code)


def _of_others(found: list[dict[str, Any] | None]) -> list[str]:
    """The problems that the first process did not find itself, each once, with those who have it."""
    places: dict[str, list[str]] = {}
    devices: dict[str, list[str]] = {}
    for rank, words in enumerate(found):
        if words is None:
            places.setdefault("processes: did not come in time", []).append(f"rank {rank}")
            continue
        devices.setdefault(words["device"], []).append(words["where"])
        for problem in words["problems"] if rank > 0 else []:
            places.setdefault(problem, []).append(words["where"])
    own = (found[0] or {"where": "", "problems": []})["where"].split(" ")[0]
    lines = []
    for problem, who in places.items():
        if found[0] and problem in found[0]["problems"]:  # printed already; worth a line if other hosts have it too
            who = [where for where in who if where.split(" ")[0] != own]
        if who:
            lines.append(f"{', '.join(who)}: {problem}")
    if len(devices) > 1:
        there = " but ".join(f"{device} on {', '.join(who)}" for device, who in sorted(devices.items()))
        lines.append(f"processes: {there}; all must train on the same")
    return lines
