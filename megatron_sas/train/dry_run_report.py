"""What a dry run found, on all hosts: each process tells the others its problems, and rank 0 prints them."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_sas.core.cli import InputError, first_line
from megatron_sas.core.distributed import local_rank
from megatron_sas.launch.environment import environment_from_launcher, number_of_processes
from megatron_sas.run.signals import rank_by_launcher

Result = TypeVar("Result")

GRACE = timedelta(seconds=10)
"""How long a process may take to fail by itself after another has."""


class Report:
    """One line per check of rank 0, and one per problem of the other ranks.

    Problems travel through the key-value store at MASTER_ADDR and not with collectives, which need the very GPUs and
    networks that are checked here.
    """

    def __init__(self) -> None:
        self.rank = rank_by_launcher()
        self.timeout = timedelta(minutes=30)  # for a process to come, which may read slowly
        self._problems: list[str] = []  # of this process, since they were last exchanged
        self._count = 0  # that were printed
        self._round = 0
        self._store: dist.Store | None = None  # None: a single process, or one that cannot reach the others

    @property
    def where(self) -> str:
        """This process, in messages."""
        return f"{socket.gethostname()} (rank {self.rank})"

    @property
    def place(self) -> str:
        """What this process uses: host, number there, device, and where it meets the others."""
        gpu = f"cuda:{local_rank()} of {torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
        meeting = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        return (
            f"rank {self.rank}: {socket.gethostname()}, local rank {local_rank()}, {gpu}, meets the others at {meeting}"
        )

    def join(self) -> int:
        """Reach the other processes, if there are any; returns how many there are.

        Raises:
            InputError: they do not meet.
        """
        environment_from_launcher()
        self.rank = int(os.environ.get("RANK", "0"))
        if number_of_processes() > 1:
            try:
                store, *_ = next(dist.rendezvous("env://", timeout=self.timeout))
            except (RuntimeError, ValueError) as error:
                message = (
                    f"cannot meet the others at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} "
                    f"({first_line(error)}); is MASTER_ADDR the first host, and MASTER_PORT free there and open to the "
                    "others?"
                )
                if self.rank > 0:  # rank 0 will not hear of it
                    print(f"problem  {self.where}: processes: {message}", flush=True)
                raise InputError(message) from None
            self._store = dist.PrefixStore("dry run", store)
        return number_of_processes()

    def check(self, name: str, action: Callable[[], Result], describe: Callable[[Result], Any] = str) -> Result | None:
        """Run `action` and report what it found; None when it raised."""
        try:
            result = action()
        except (InputError, OSError) as error:
            self.problem(f"{name}: {error}")
            return None
        self._print(f"ok       {name}: {describe(result)}")
        return result

    def problem(self, line: str) -> None:
        """Report a problem that was found in another way than by `check`."""
        self._problems.append(line)
        self._print_problem(line)

    def warn(self, line: str) -> None:
        """Report what does not keep a run from starting."""
        self._print(f"warning  {line}")

    def agree(self) -> bool:
        """Exchange the problems since the last time; whether there were none, the same on all processes."""
        own, self._problems = self._problems, []
        if self._store is None:
            return not own
        keys = [f"{self._round}/{rank}" for rank in range(number_of_processes())]
        self._round += 1
        device = "a GPU" if torch.cuda.is_available() else "no GPU"
        try:
            self._store.set(keys[self.rank], json.dumps([self.where, device, own, self.place]))
            with contextlib.suppress(dist.DistStoreError):  # who did not come is found below
                self._store.wait(keys, self.timeout)
            every = [json.loads(self._store.get(key)) if self._store.check([key]) else None for key in keys]
        except RuntimeError as error:
            print(f"problem  {self.where}: processes: lost contact with rank 0 ({first_line(error)})", flush=True)
            self._store = None
            return False
        if self._round == 1:
            for words in filter(None, every):
                self._print(f"ok       {words[3]}")
        others = of_others(every)
        for line in others:
            self._print_problem(line)
        return not own and not others and not (every[0] and every[0][2])

    @contextlib.contextmanager
    def all_or_none(self) -> Iterator[None]:
        """For a block with collectives, before `agree`: when a process reports a problem in it, none waits for long.

        One that is still in the block some seconds later waits in a collective that nobody else will join. It ends.
        """
        done = threading.Event()
        if self._store is not None:
            threading.Thread(target=self._end_if_another_fails, args=(done,), daemon=True).start()
        try:
            yield
        finally:
            done.set()
        if self._store is not None and self._problems:
            self._store.set("failed", "")

    def _end_if_another_fails(self, done: threading.Event) -> None:
        with contextlib.suppress(RuntimeError):  # without the store nobody can be reached
            while not done.wait(0.5):
                if self._store.check(["failed"]) and not done.wait(GRACE.total_seconds()):
                    self.agree()
                    code = self.fail()
                    sys.stdout.flush()
                    os._exit(code)  # the main thread is stuck in its collective

    def fail(self) -> int:
        """Report that a run would fail; returns the exit code."""
        if self.rank == 0:
            count = max(self._count, 1)  # contact lost is one
            print(f"{count} problem{'s' if count > 1 else ''}; a run would fail", file=sys.stderr, flush=True)
        self.leave()
        return 2

    def leave(self) -> None:
        """Part, rank 0 first and after it has printed: a launcher that sees a process end stops the others.

        Rank 0 may still be in a collective with one that leaves, and its exit code is the one that counts.
        """
        if self._store is not None:
            with contextlib.suppress(RuntimeError):  # rank 0 is gone, so it has printed
                if self.rank > 0:
                    self._store.wait(["printed"], 3 * GRACE)
                else:
                    self._store.set("printed", "")
                    time.sleep(0.5)  # the store may end with this process: let the others read it first
        if self.rank > 0:
            time.sleep(2)

    def _print(self, line: str) -> None:
        if self.rank == 0:
            print(line, flush=True)

    def _print_problem(self, line: str) -> None:
        self._count += 1
        self._print(f"problem  {line}")


def of_others(every: list[Sequence | None]) -> list[str]:
    """The problems that rank 0 did not find itself, each once, with those who have it.

    `every` has for each rank its host, kind of device, problems (and more), or None if it did not come.
    """
    places, devices = defaultdict(list), defaultdict(list)
    first, _, printed, *_ = every[0] or ("", "", [])
    for rank, words in enumerate(every):
        if words is None:
            places["processes: did not come in time"].append(f"rank {rank}")
            continue
        where, device, problems, *_ = words
        devices[device].append(where)
        same_host = where.split(" ")[0] == first.split(" ")[0]  # where what rank 0 has found was printed already
        for problem in problems if rank > 0 else []:
            if not (same_host and problem in printed):
                places[problem].append(where)
    lines = [f"{', '.join(who)}: {problem}" for problem, who in places.items()]
    if len(devices) > 1:
        there = " but ".join(f"{device} on {', '.join(who)}" for device, who in sorted(devices.items()))
        lines.append(f"processes: {there}; all must train on the same")
    return lines
