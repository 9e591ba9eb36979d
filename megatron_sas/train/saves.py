"""Checkpoints and snapshots at the steps that the configuration names, and checkpoints when the clock says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_sas.core import distributed
from megatron_sas.launch.watchdog import Watchdog
from megatron_sas.onsets.online import WatchSection
from megatron_sas.run.saver import CheckpointSection, Saver, SnapshotSection
from megatron_sas.train.collaborator import Collaborator
from megatron_sas.train.journal import Journal
from megatron_sas.train.onset_snapshots import OnsetSnapshots
from megatron_sas.train.step_log import StepLog


class Saves(Collaborator):
    """Decides what is written when; `Saver` writes it."""

    def __init__(
        self,
        sections: tuple[CheckpointSection, SnapshotSection, WatchSection],
        saver: Saver,
        step_log: StepLog,
        journal: Journal,
        watchdog: Watchdog,
        last_step: int,
        state: Callable[[], dict[str, Any]],
        clock: Callable[[], float],
        ring: OnsetSnapshots | None,
    ) -> None:
        """`state` returns what a checkpoint keeps beside tensors; `clock` counts seconds; `ring` is rank 0's watch."""
        self.checkpoints, self.snapshots, self.watch = sections
        self.saver, self.step_log, self.journal, self.watchdog = saver, step_log, journal, watchdog
        self.last_step, self.state, self.clock = last_step, state, clock
        self.ring = ring
        self._saved_at = clock()  # when the newest checkpoint was begun, or this start of the run
        self._due_now = False  # by the clock

    def flags(self) -> tuple[int, ...]:
        """Whether a checkpoint is due by the clock, which is rank 0's; and how the save under way stands."""
        seconds = self.checkpoints.seconds
        unsaved = distributed.is_main() and seconds is not None and self.clock() - self._saved_at >= seconds
        return int(unsaved), *self.saver.flags()

    def react(self, *sums: int) -> None:
        """Go on with the save under way.

        Raises:
            OSError: on every rank, when it failed on any.
        """
        unsaved, written, failed = sums
        self._due_now = unsaved > 0
        self.saver.react(written, failed)

    def begin(self, step: int, resumed: bool) -> None:
        """Save the initial model; a resumed run has its checkpoint."""
        if not resumed:
            self.after_update(step)

    def after_update(self, step: int) -> None:
        """Save what is due."""
        checkpoint = self.checkpoints.due(step, self.last_step)
        snapshot = self.snapshots.due(step, self.last_step) or self.watch.due(step)
        if checkpoint or snapshot or self._due_now:
            # When the clock asks, nothing but the time may show in the records.
            self.step_log.flush(speed=checkpoint or snapshot)
            self._save(step, checkpoint or self._due_now, snapshot)

    def save_last(self, step: int) -> None:
        """Write a checkpoint of the step after which the run stops, unless there is one."""
        if step != self.saver.step:
            self.step_log.flush()
            self._save(step, checkpoint=True, snapshot=False)

    def _save(self, step: int, checkpoint: bool, snapshot: bool) -> None:
        """Begin to write what is due.

        While updates are being skipped there is no checkpoint, so that the newest is from before the trouble; only the
        last step always has one.
        """
        checkpoint = checkpoint and (self.step_log.skipped.in_a_row == 0 or step == self.last_step)
        if not (checkpoint or snapshot):
            return
        self.watchdog.beat(f"the checkpoint of step {step}")
        self.journal.flush()  # a checkpoint has all records before it
        with self.step_log.throughput.paused():
            if checkpoint:
                self._saved_at = self.clock()
            directory = self.saver.run.snapshots if self.ring is None or not snapshot else self.ring.place(step)
            self.saver.begin(step, self.state(), checkpoint=checkpoint, snapshot=directory if snapshot else None)
