"""Whether Slurm still knows of this process. Needs nothing that takes long to import."""

from __future__ import annotations

import contextlib
import functools
import os
from pathlib import Path

NAME = "slurmstepd"
ENDED = 0
"""Stands for the process id of a slurmstepd that ended before it was looked for."""
LOST = (
    "the slurmstepd of this process is gone, so Slurm can neither stop it nor learn of its end; started again, the run "
    "continues from its newest checkpoint"
)


@functools.cache
def own_slurmstepd(proc: Path = Path("/proc")) -> int | None:
    """The process id of the nearest slurmstepd above this process, under a launcher or not; None without Slurm.

    `ENDED` if there is none although Slurm has started this process or one above it. In a container with process ids of
    its own that cannot be seen: None. The first answer is kept: `main` asks before anything is imported, and later it
    may be gone.
    """
    process, task, by_slurm = "self", os.environ.get("SLURM_TASK_PID"), False
    while process not in ("0", "1"):
        try:
            stat = (proc / process / "stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None
        number, _, rest = stat.partition(" (")
        name, _, fields = rest.rpartition(")")
        if process != "self" and name.startswith(NAME):
            return int(process)
        by_slurm |= number == task
        process = fields.split()[1]
    return ENDED if by_slurm else None


def is_gone(process: int | None, proc: Path = Path("/proc")) -> bool:
    """Whether that slurmstepd has ended; another process may have got its number."""
    if process is None:
        return False
    with contextlib.suppress(OSError):
        name = (proc / str(process) / "stat").read_text(encoding="utf-8", errors="replace").partition("(")[2]
        return not name.startswith(NAME) or name.rpartition(")")[2].split()[0] == "Z"
    return True
