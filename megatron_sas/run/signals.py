"""Requests to stop: signals and a stop file, turned into a flag that all ranks agree on at the end of an update.

A signal often reaches one rank only (the `deepspeed` launcher sends it to one after another) or none (it drops
SIGUSR1), hence the file. What to do next is told by another file, because launchers do not pass exit codes on:
`RUN_DIR/requeue` exists after a run that stopped before its end and wants to be started again, and holds the reason.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from megatron_sas.core.files import write_text_atomic

STOP = "stop"
REQUEUE = "requeue"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def rank_by_launcher() -> int:
    """This process's rank before it has joined the others."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


class StopRequest:
    """What this process was asked."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._interrupted = False  # by a Ctrl-C, after which launchers send a SIGTERM
        self._since = time.time()
        self._before: dict[signal.Signals, Callable | int | None] = {}

    def listen(self) -> None:
        """Take signals for requests from now on; only the main thread can say so."""
        self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def no_longer_listen(self) -> None:
        """Have signals do again what they did before `listen`, at once if one has come since."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.reason is not None:
            came, self.reason, self._interrupted = signal.Signals[self.reason], None, False
            signal.raise_signal(came)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._interrupted:  # the second one: now
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            raise KeyboardInterrupt
        self._interrupted |= number == signal.SIGINT
        before, self.reason = self.reason, signal.Signals(number).name
        if self.reason != before and rank_by_launcher() == 0:
            start = "\n" if os.isatty(2) else ""  # below a progress bar
            more = "; Ctrl-C again ends at once" if number == signal.SIGINT else ""
            with contextlib.suppress(OSError):  # not `print`, which may be what the signal interrupted
                os.write(2, f"{start}{self.reason}: stopping after this update{more}\n".encode())

    def look_for_file(self, run_dir: str | Path) -> None:
        """Take a file `stop` in the run's directory for a request."""
        path = Path(run_dir) / STOP
        if self.reason is None and path.exists():
            self.reason = f"file {path}"

    def clear_marks(self, run_dir: str | Path) -> None:
        """The run begins: remove its requeue marker, and a stop file that was meant for an earlier process."""
        requeue, stop = Path(run_dir) / REQUEUE, Path(run_dir) / STOP
        if os.path.lexists(requeue):
            requeue.unlink()
        if stop.exists() and stop.stat().st_mtime < self._since:
            stop.unlink()


def mark_for_requeue(run_dir: str | Path, reason: str) -> None:
    """Say that the run stopped before its end and should be started again; a stop file has done its work."""
    write_text_atomic(Path(run_dir) / REQUEUE, reason + "\n")
    (Path(run_dir) / STOP).unlink(missing_ok=True)
