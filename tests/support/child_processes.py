"""What the system says of processes that a test has started."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def children(pid: int) -> list[int]:
    """The processes that `pid` has started and that have not been collected."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    """Whether a process exists and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def open_files(pid: int) -> list[str]:
    """Paths that a process has open, none for one that has ended."""
    found = []
    with contextlib.suppress(OSError):
        found += [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()]
    return found
