"""One directory, one program that writes it: a lock that ends with the process that holds it, however that ends."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from pathlib import Path
from typing import IO

from megatron_sas.core.cli import InputError

LOCK = ".lock"
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class DirectoryLock:
    """A claim to a directory, taken later; `remedy` is what to do when another process has it."""

    def __init__(self, directory: str | Path, remedy: str) -> None:
        self.path, self.remedy = Path(directory) / LOCK, remedy
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
                holder = file.read().strip() or "another process"
                file.close()
                raise InputError(f"{self.path.parent}: {holder} is running in this directory; {self.remedy}") from None
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        self._file = file

    def close(self) -> None:
        """Let others have it."""
        if self._file is not None:
            self._file.close()
            self._file = None
