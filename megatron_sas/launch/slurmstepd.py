"""Whether Slurm still knows of this process. Needs nothing that takes long to import."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path

NAME = "slurmstepd"
LOST = (
    "the slurmstepd of this process is gone, so Slurm can neither stop it nor learn of its end; started again, the run "
    "continues from its newest checkpoint"
)


@functools.cache
def own_slurmstepd(proc: Path = Path("/proc")) -> int | None:
    """The process id of the nearest slurmstepd above this process, under a launcher or not; None without Slurm.

    The first answer is kept: `main` asks before anything is imported, and later it may be gone.
    """
    process = "self"
    while process not in ("0", "1"):
        try:
            stat = (proc / process / "stat").read_text(encoding="utf-8", errors="replace")
            name, _, fields = stat.partition("(")[2].rpartition(")")
        except OSError:
            return None
        if process != "self" and name.startswith(NAME):
            return int(process)
        process = fields.split()[1]
    return None


def is_gone(process: int | None, proc: Path = Path("/proc")) -> bool:
    """Whether that slurmstepd has ended; another process may have got its number."""
    if process is None:
        return False
    with contextlib.suppress(OSError):
        name = (proc / str(process) / "stat").read_text(encoding="utf-8", errors="replace").partition("(")[2]
        return not name.startswith(NAME) or name.rpartition(")")[2].split()[0] == "Z"
    return True
