"""One directory, one program that writes it: a lock that ends with the process that holds it, however that ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from pathlib import Path
from typing import IO, NamedTuple

import psutil

from megatron_sas.core.cli import InputError

LOCK = ".lock"
SINCE = " since "
"""In a line about a process that outlasts its program if that is killed: between its name and its time of start."""

CLOCKS_DIFFER = 5.0  # seconds; times of start move when the host's clock is set, and no number comes again so soon

UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class DirectoryLock:
    """A claim to a directory, taken later; `remedy` is what to do when another process has it."""

    def __init__(self, directory: str | Path, remedy: str) -> None:
        self.path, self.remedy = Path(directory) / LOCK, remedy
        self.before: list[str] = []  # lines with SINCE of earlier holders that did not `release` the directory
        self._file: IO[str] | None = None

    @property
    def held(self) -> bool:
        """Whether the directory is ours."""
        return self._file is not None

    def take(self) -> None:
        """Claim the directory, which is made if need be; nothing happens if it is ours already.

        On a file system without locks the claim is only written down.

        Raises:
            InputError: a process that still lives has it.
        """
        if self.held:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = open(self.path, "a+", encoding="utf-8")  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                file.seek(0)
                holder = file.readline().partition(SINCE)[0].strip() or "another process"
                file.close()
                raise InputError(f"{self.path.parent}: {holder} is running in this directory; {self.remedy}") from None
        file.seek(0)
        self.before, self._file = [line for line in file.read().splitlines() if SINCE in line], file
        self.write([f"process {os.getpid()} on {socket.gethostname()}", *self.before])

    def write(self, lines: list[str]) -> None:
        """Put down who has it: first the process that messages name."""
        self._file.seek(0)
        self._file.truncate()
        self._file.writelines(f"{line}\n" for line in lines)
        self._file.flush()

    def release(self) -> None:
        """Let others have it, and leave nothing for them to read: all is done."""
        if self._file is not None:
            self.write([])
            self.close()

    def close(self) -> None:
        """Let others have it."""
        if self._file is not None:
            self._file.close()
            self._file = None


class Holder(NamedTuple):
    """A process that a lock names."""

    process: int  # its id on that host
    host: str
    line: str  # as it stands in the lock

    @property
    def is_alive(self) -> bool:
        """Whether it is there, if its host is this one; a line without SINCE tells the process by its id alone."""
        return still_runs(self.line) if SINCE in self.line else psutil.pid_exists(self.process)


def read_holder(directory: str | Path) -> Holder | None:
    """The process that the lock of `directory` names first; None: nobody has it, or the last one has released it.

    The lock is only read: who tries to take it, for however short a time, may keep out a program that starts.
    """
    with contextlib.suppress(FileNotFoundError, ValueError), open(Path(directory) / LOCK, encoding="utf-8") as file:
        line = file.readline().strip()
        name, _, host = line.partition(SINCE)[0].partition(" on ")
        return Holder(int(name.removeprefix("process ")), host, line)
    return None


def this_process() -> str:
    """A line that names this process, so that `still_runs` can recognise it."""
    return f"process {os.getpid()} on {socket.gethostname()}{SINCE}{psutil.Process().create_time():.2f}"


def still_runs(line: str) -> bool:
    """Whether the process of this host that wrote the line `this_process` is there: by number and time of start."""
    name, _, began = line.partition(SINCE)
    with contextlib.suppress(psutil.NoSuchProcess, IndexError, ValueError):
        process = psutil.Process(int(name.split()[1]))
        same = abs(process.create_time() - float(began)) < CLOCKS_DIFFER
        return same and process.status() != psutil.STATUS_ZOMBIE
    return False
