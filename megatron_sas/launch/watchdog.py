"""A thread of each rank that ends the process when training makes no progress, and names the rank it waits for.

When one rank hangs, the others wait in a collective that knows neither who is missing nor, for half an hour, that
something is wrong. The ranks therefore tell each other what they do through the process group's key-value store.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from megatron_sas.core import distributed
from megatron_sas.launch.slurmstepd import LOST, is_gone, own_slurmstepd

EXIT_CODE = 3
STORE_TIMEOUT = timedelta(seconds=2)
STORE_SILENT = "it waits for rank 0 or its launcher, which keeps the store of the process group and does not answer"
KEY = "megatron_sas/watchdog/{}"
"""In the store, by rank: when it last wrote there, since when it does what it does, what, and its host."""


class Watchdog:
    """Watches the time between calls of `beat`. A context manager; nothing is watched outside of it."""

    def __init__(
        self, timeout_minutes: float, clock: Callable[[], float] = time.time, exit: Callable[[int], None] = os._exit
    ) -> None:
        """`clock` gives unix seconds; `exit` ends the process."""
        self._timeout, self._clock, self._exit = timeout_minutes * 60, clock, exit
        self._ended, self._store = threading.Event(), None
        self._slurmstepd = own_slurmstepd()
        self.beat("starting")
        if distributed.world_size() > 1:  # a connection of its own: the training thread may be waiting in the group's
            self._store = dist.distributed_c10d._get_default_store().clone()
            self._store.set_timeout(STORE_TIMEOUT)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, doing: str) -> None:
        """The training thread begins something new, such as "update 7"."""
        self._doing, self._since = doing, self._clock()

    def __enter__(self) -> Watchdog:
        self.beat(self._doing)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        interval = min(10.0, self._timeout / 4)
        while True:
            asleep = self._clock()
            fault = self._tell()
            if fault == STORE_SILENT:  # for which it has waited
                asleep = self._clock()
            if self._ended.wait(interval):
                return None
            if is_gone(self._slurmstepd):
                where = f"rank {distributed.rank()} on {socket.gethostname()}"
                print(f"error: {where}: {LOST}", file=sys.stderr, flush=True)
                return self._exit(EXIT_CODE)
            if self._clock() - asleep > 2 * interval + 1:  # this process was suspended: its time begins again
                self._since = self._clock()
            if self._clock() - self._since > self._timeout and not self._ended.is_set():
                others = fault or self._ask(interval)
                print(
                    f"error: rank {distributed.rank()}: no progress for {self._timeout / 60:g} minutes in "
                    f"{self._doing} (run.timeout_minutes); {others}. Started again, the run continues from its newest "
                    "checkpoint",
                    file=sys.stderr,
                    flush=True,
                )
                self._exit(EXIT_CODE)  # the training thread cannot be interrupted

    def _tell(self) -> str | None:
        """Tell the others what this rank does; returns what is wrong with the store."""
        if self._store is None:
            return "it waits for nobody else"
        try:
            words = [self._clock(), self._since, self._doing, socket.gethostname()]
            self._store.set(KEY.format(distributed.rank()), json.dumps(words))
        except (RuntimeError, OSError):  # torch's store errors are RuntimeErrors
            return STORE_SILENT
        return None

    def _ask(self, interval: float) -> str:
        """`_others`, in a thread of its own: if the store hangs, so may the call, whatever its timeout."""
        answer: list[str] = []
        thread = threading.Thread(target=lambda: answer.append(self._others(interval)), daemon=True)
        thread.start()
        thread.join(4 * STORE_TIMEOUT.total_seconds())
        return answer[0] if answer else STORE_SILENT

    def _others(self, interval: float) -> str:
        """Which ranks are silent, or else are behind this one."""
        silent, behind = [], []
        for rank in range(distributed.world_size()):
            try:
                wrote, since, doing, host = json.loads(self._store.get(KEY.format(rank)))
            except (RuntimeError, OSError, ValueError):
                silent.append(f"rank {rank} (never heard of)")
                continue
            if (age := self._clock() - wrote) > 2 * interval + 1:
                silent.append(f"rank {rank} on {host} (silent for {age:.0f} s, last in {doing})")
            elif rank != distributed.rank() and doing != self._doing:
                behind.append(f"rank {rank} on {host} (for {self._clock() - since:.0f} s in {doing})")
        if silent or behind:
            return "it waits for " + ", ".join(silent or behind)
        return "all ranks answer and are in the same place: a collective or the file system hangs"
