"""Requests to stop: signals and a stop file, turned into a flag that all ranks agree on at the end of an update.

A signal often reaches one rank only (the `deepspeed` launcher sends it to one after another) or none (it drops
SIGUSR1), hence the file. Launchers do not pass exit codes on: `RUN_DIR/requeue` exists after a run that stopped before
its end and wants to be started again, and holds the reason.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from types import FrameType

from megatron_sas.core.files import write_text_atomic
from megatron_sas.run.directory import RunDirectory

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


def signals_to_heed() -> list[signal.Signals]:
    """Signals that ask a program to save and end: `SIGNALS`, but SIGHUP only if it was not ignored, as `nohup` does."""
    return [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]


def rank_by_launcher() -> int:
    """This process's rank before it has joined the others."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


class StopRequest:
    """A pending request to stop."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._since = time.time()
        self._before: dict[signal.Signals, Callable | int | None] = {}
        self._handled = bytearray()  # the number of each signal for which Python has called the handler
        self._arrived = bytearray()  # and of each that has arrived: of two that come quickly Python makes one call
        self._arrivals = -1, -1  # ends of the pipe from which these are read
        self._wakeup_before = -1

    def listen(self) -> None:
        """Install the signal handlers. Must be called from the main thread."""
        self._arrivals = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._wakeup_before = signal.set_wakeup_fd(self._arrivals[1], warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._receive) for number in signals_to_heed()}

    def no_longer_listen(self) -> None:
        """Have signals do again what they did before `listen`, at once if one has come since."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        for end in self._arrivals:
            os.close(end)
        if self.reason is not None:
            came, self.reason = signal.Signals[self.reason], None
            signal.raise_signal(came)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        """The handler, in which the next signal may arrive before any line of it."""
        name = signal.Signals(number).name
        before, self.reason = self.reason, name
        if number == signal.SIGINT and self._interrupts(number) > 1:  # a Ctrl-C after which launchers send a SIGTERM
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            raise KeyboardInterrupt
        if name != before and rank_by_launcher() == 0:
            start = "\n" if os.isatty(2) else ""  # below a progress bar
            more = "; Ctrl-C again ends at once" if number == signal.SIGINT else ""
            with contextlib.suppress(OSError):  # not `print`, which may be what the signal interrupted
                os.write(2, f"{start}{name}: stopping after this update{more}\n".encode())

    def _interrupts(self, number: int) -> int:
        """How many Ctrl-C there have been, with the one that is handled now."""
        self._handled.append(number)
        with contextlib.suppress(BlockingIOError):  # an earlier call has read them all
            while arrived := os.read(self._arrivals[0], 4096):
                self._arrived.extend(arrived)
        return max(numbers.count(signal.SIGINT) for numbers in (self._handled, self._arrived))

    def look_for_file(self, run: RunDirectory) -> None:
        """Take a file `stop` in the run's directory for a request."""
        if self.reason is None and run.stop.exists():
            self.reason = f"file {run.stop}"

    def clear_marks(self, run: RunDirectory) -> None:
        """The run begins: remove its requeue marker, and a stop file that was meant for an earlier process."""
        run.requeue.unlink(missing_ok=True)
        if run.stop.exists() and run.stop.stat().st_mtime < self._since:
            run.stop.unlink()


def mark_for_requeue(run: RunDirectory, reason: str) -> None:
    """Mark that the run stopped before its end and should be started again; a stop file has done its work."""
    write_text_atomic(run.requeue, reason + "\n")
    run.stop.unlink(missing_ok=True)
