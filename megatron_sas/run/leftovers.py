"""What earlier starts of a run left behind when they were killed: processes that go on, and shared memory.

Each start puts its processes down in the run's lock, and takes them out when it ends in order. Half-written checkpoints
are removed by `Saver`.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Sequence
from pathlib import Path

import psutil

from megatron_sas.core import distributed
from megatron_sas.core.cli import listed
from megatron_sas.core.directory_lock import SINCE, DirectoryLock, still_runs, this_process

SHARED_MEMORY = Path("/dev/shm")
OF_LIBRARIES = ("nccl-*", "torch_*")  # what NCCL and torch call their files there


def abandoned_memory() -> list[Path]:
    """Files of this user in shared memory, older than this process, that no process seen here has mapped or open."""
    began, files = psutil.Process().create_time(), set()
    for path in (path for pattern in OF_LIBRARIES for path in SHARED_MEMORY.glob(pattern)):
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            if status.st_uid == os.getuid() and status.st_ctime < began:
                files.add(str(path))
    for process in psutil.process_iter() if files else ():
        with contextlib.suppress(psutil.Error, OSError):
            files -= {mapped.path for mapped in process.memory_maps()}
            files -= {file.path for file in process.open_files()}
    return [Path(file) for file in sorted(files)]


def leftovers(lock: DirectoryLock) -> list[str]:
    """Look on all hosts for what is left of earlier starts, and put this one's processes down for the next.

    A collective; rank 0 holds the lock. Returns lines for the user, each with its remedy, the same on every rank.
    """
    before = distributed.broadcast_object(lock.before)
    here = [line for line in before if _name(line).endswith(f" on {socket.gethostname()}")]
    alive = [line for line in here if line != this_process() and still_runs(line)]
    found = distributed.gather_objects((this_process(), alive, _describe(abandoned_memory())))
    alive = list(dict.fromkeys(line for _, lines, _ in found for line in lines))
    if distributed.is_main():
        lock.write([*(process for process, _, _ in found), *alive])
    lines = []
    if before:
        lines.append(f"an earlier start of this run was killed or failed: {listed([_name(line) for line in before])}")
    for line in alive:
        remedy = f"`kill -9 {line.split()[1]}` there ends it"
        lines.append(f"{_name(line)} is left of an earlier start and still holds memory; {remedy}")
    return lines + list(dict.fromkeys(memory for _, _, memory in found if memory))


def _name(line: str) -> str:
    return line.partition(SINCE)[0]


def _describe(memory: Sequence[Path]) -> str | None:
    if not memory:
        return None
    size = sum(path.stat().st_size for path in memory) / 2**20
    return (
        f"shared memory that killed programs have left on {socket.gethostname()} ({size:.0f} MiB): "
        f"{listed([str(path) for path in memory])}; remove it unless a program in another container uses it"
    )
