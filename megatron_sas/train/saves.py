"""Checkpoints and snapshots at the steps that the configuration names, and checkpoints when the clock says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_sas.core import distributed
from megatron_sas.launch.watchdog import Watchdog
from megatron_sas.train.build import BuiltRun
from megatron_sas.train.collaborator import Collaborator
from megatron_sas.train.onset_snapshots import OnsetSnapshots
from megatron_sas.train.step_log import StepLog


class Saves(Collaborator):
    """Decides what is written when; `Saver` writes it."""

    def __init__(
        self,
        built: BuiltRun,
        log: StepLog,
        watchdog: Watchdog,
        state: Callable[[], dict[str, Any]],
        ring: OnsetSnapshots | None,
    ) -> None:
        """`state` returns what a checkpoint keeps as well as tensors; `ring` is rank 0's watch, if there is one."""
        self.config, self.saver, self.clock = built.config, built.saver, built.clock
        self.log, self.watchdog, self.state, self.ring = log, watchdog, state, ring
        self.last_step = built.config.train.steps
        self._saved_at = self.clock()  # when the newest checkpoint was begun, or this start of the run
        self._due_now = False  # by the clock

    def flags(self) -> tuple[int, ...]:
        """Whether a checkpoint is due by the clock, which is rank 0's; and how the save under way stands."""
        seconds = self.config.checkpoint.seconds
        unsaved = distributed.is_main() and seconds is not None and self.clock() - self._saved_at >= seconds
        return int(unsaved), *self.saver.flags()

    def react(self, *sums: int) -> None:
        """Go on with the save under way.

        Raises:
            OSError: on every rank, when it failed on any.
        """
        self._due_now = sums[0] > 0
        self.saver.react(*sums[1:])

    def begin(self, step: int, resumed: bool) -> None:
        """Save the initial model; a resumed run has its checkpoint."""
        if not resumed:
            self.after_update(step)

    def after_update(self, step: int) -> None:
        """Save what is due."""
        checkpoint = self.config.checkpoint.due(step, self.last_step)
        snapshot = self.config.snapshots.due(step, self.last_step) or self.config.watch.due(step)
        if checkpoint or snapshot or self._due_now:
            # When the clock asks, nothing but the time may show in the records.
            self.log.flush(speed=checkpoint or snapshot)
            self._save(step, checkpoint or self._due_now, snapshot)

    def save_last(self, step: int) -> None:
        """Write a checkpoint of the step after which the run stops, unless there is one."""
        if step != self.saver.step:
            self.log.flush()
            self._save(step, checkpoint=True, snapshot=False)

    def _save(self, step: int, checkpoint: bool, snapshot: bool) -> None:
        """Begin to write what is due.

        While updates are being skipped there is no checkpoint, so that the newest is from before the trouble; only the
        last step always has one.
        """
        checkpoint = checkpoint and (self.log.skipped_in_a_row == 0 or step == self.last_step)
        if not (checkpoint or snapshot):
            return
        self.watchdog.beat(f"the checkpoint of step {step}")
        self.log.journal.flush()  # a checkpoint has all records before it
        with self.log.throughput.paused():
            if checkpoint:
                self._saved_at = self.clock()
            directory = None
            if snapshot:
                directory = self.saver.run.snapshots if self.ring is None else self.ring.place(step)
            self.saver.begin(step, self.state(), checkpoint=checkpoint, snapshot=directory)
