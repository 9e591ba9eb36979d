"""Checkpoints and snapshots written next to training.

The training thread only gathers tensors into host memory. A background thread of each rank writes, hashes and flushes;
it never communicates, since collectives of two threads could meet in another order on another rank. That a rank has
written its files, or has failed, travels as flags with the next updates; when all have written, rank 0's background
thread publishes the checkpoint. One save is under way at a time: the next one waits for it.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from megatron_sas.core import distributed
from megatron_sas.core.files import atomic_directory, remove
from megatron_sas.core.settings import When
from megatron_sas.run.checkpoint import (
    RankSlice,
    TrainingState,
    check_finite,
    gather_slice,
    partial_directory,
    publish,
    remove_old_checkpoints,
    write_slice,
)
from megatron_sas.run.directory import RunDirectory, step_name


class CheckpointSection(When):
    """When complete checkpoints are written, and which are kept; default: every 10 minutes, the last two."""

    minutes: float | None = Field(
        None, description="also after so many minutes; 0: never; default: 10 when no steps are named here", ge=0, le=1e6
    )
    keep_last: int | None = Field(
        None, description="keep so many of the newest; default: all, but 2 when no steps are named here", ge=1
    )
    keep_every: int | None = Field(None, description="also keep those at multiples of this step", ge=1)

    @property
    def seconds(self) -> float | None:
        """After how long a checkpoint is due, whatever the step; None: never by the clock."""
        minutes = self.minutes if self.minutes is not None or self.names_steps else 10.0
        return 60.0 * minutes if minutes else None

    @property
    def kept(self) -> int | None:
        """How many of the newest are kept; None: all."""
        return self.keep_last if self.keep_last is not None or self.names_steps else 2

    def faults(self) -> list[str]:
        """`keep_every` makes exceptions from `keep_last`, and what the clock writes has no other limit."""
        faults = super().faults()
        if self.kept is None:
            faults += ["keep_every: needs keep_last"] if self.keep_every else []
            faults += ["minutes: needs keep_last, or there is no end of checkpoints"] if self.minutes else []
        return faults


class SnapshotSection(When):
    """When the model alone is written, as a Hugging Face directory in snapshots/; default: never."""

    dtype: Literal["bf16", "fp32"] = Field("bf16", description="precision of the written weights")

    def due(self, step: int, last_step: int) -> bool:
        """Whether `step` belongs to the set; no step does when nothing is configured."""
        return self.names_steps and super().due(step, last_step)


class Saver:
    """Writes the checkpoints and snapshots of one run. Its methods are called on all ranks alike."""

    def __init__(
        self,
        run: RunDirectory,
        section: CheckpointSection,
        engine: TrainingState,
        describe: Callable[[Path, int, dict[str, Any]], None],
        write_model: Callable[[Path, int, dict[str, Tensor]], None],
        write: Callable[[Path, RankSlice], None] = write_slice,
    ) -> None:
        """Write to `run` what `engine` holds.

        Args:
            describe: writes into a directory what a checkpoint has as well as tensors, given the step and the counters.
            write_model: writes into a directory a model for other programs, given the step and its weights by name.
            write: writes this rank's tensors into a directory.
        """
        self.run, self.section, self.engine = run, section, engine
        self._describe, self._write_model, self._write_slice = describe, write_model, write
        self.step: int | None = None  # of the newest checkpoint that was begun
        self.published = -1  # step of the newest complete one; rank 0
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._token = distributed.broadcast_object(secrets.token_hex(4))  # the same for all ranks of this start
        self._where = run.path  # for messages
        self._unpublished: int | None = None  # step of a checkpoint that is being written
        self._writing: Future | None = None
        self._publishing: Future | None = None  # rank 0
        self.removed = run.leftovers() if distributed.is_main() else []  # of killed starts
        for path in self.removed:
            remove(path)

    def begin(self, step: int, state: dict[str, Any], *, checkpoint: bool, snapshot: Path | None) -> None:
        """Gather what is to be saved and start writing it. A collective.

        `snapshot` is the directory of models by step for the model alone; None: no snapshot.

        Raises:
            OSError: on every rank, when the save before this one failed on any.
        """
        self.finish()
        part = gather_slice(self.engine, step, with_moments=checkpoint)
        model = None if snapshot is None else snapshot / step_name(step)
        if model is not None:
            self._where = model
        if checkpoint:
            self._where = self.run.checkpoint(step)
            self.step = self._unpublished = step
        self._writing = self._executor.submit(self._write, step, part, model, state if checkpoint else None)

    def flags(self) -> tuple[int, int]:
        """Whether this rank has written its part, and whether it has failed; to be summed over the ranks."""
        done = [work for work in (self._writing, self._publishing) if work is not None and work.done()]
        failed = any(work.exception() is not None for work in done)
        return int(self._writing in done and not failed), int(failed)

    def react(self, written: int, failed: int) -> None:
        """Go on with the save under way, given the sums of `flags` over all ranks.

        Raises:
            OSError: on every rank, when the save failed on any.
        """
        if failed:
            self.finish()
        if written == distributed.world_size():
            self._start_publishing()

    def finish(self) -> None:
        """Wait until the save under way is published. A collective.

        Raises:
            OSError: on every rank, when it failed on any; the partial checkpoint is removed.
        """
        try:
            self._together(self._writing)
            self._start_publishing()
            self._together(self._publishing)
        except OSError:
            if distributed.is_main() and self._unpublished is not None:
                with contextlib.suppress(OSError):  # what could not be written may not be removed either
                    remove(self._partial(self._unpublished))
            raise
        finally:
            self._writing = self._publishing = self._unpublished = None

    def wait_for_thread(self) -> None:
        """Wait for this rank's writer thread. Failures are shared through `react`, as usual."""
        for work in (self._writing, self._publishing):
            if work is not None:
                work.exception()

    def _partial(self, step: int) -> Path:
        return partial_directory(self.run, step, self._token)

    def _write(self, step: int, part: RankSlice, model: Path | None, state: dict[str, Any] | None) -> None:
        """In the thread: write the snapshot `model` (rank 0) and, given its counters, this rank's part of a checkpoint.

        Raises:
            OSError: something is not finite or cannot be written.
        """
        check_finite(part)
        if model is not None and distributed.is_main():
            with atomic_directory(model, overwrite=True) as directory:
                self._write_model(directory, step, part.weights)
        if state is not None:
            self._write_slice(self._partial(step), part)
            if distributed.is_main():
                self._describe(self._partial(step), step, state)

    def _start_publishing(self) -> None:
        if distributed.is_main() and self._unpublished is not None and self._publishing is None:
            self._publishing = self._executor.submit(self._publish, self._unpublished)

    def _publish(self, step: int) -> None:
        publish(self._partial(step), step, distributed.world_size())
        self.published = step
        if self.section.kept is not None:
            remove_old_checkpoints(self.run, step, self.section.kept, self.section.keep_every)

    def _together(self, work: Future | None) -> None:
        """Wait for `work` on all ranks, and raise on all if it failed on any."""
        error = None if work is None else work.exception()
        fault = None if error is None else f"rank {distributed.rank()}: {error}"
        if faults := [f for f in distributed.gather_objects(fault) if f]:
            raise OSError(f"{self._where}: could not be written ({faults[0]})")
