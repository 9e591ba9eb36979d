"""Checkpoints and snapshots written beside training.

The training thread only gathers tensors into host memory. A background thread of each rank writes, hashes and flushes;
it never communicates, since collectives of two threads could meet in another order on another rank. That a rank has
written its files, or has failed, travels as flags with the next updates; when all have written, rank 0's background
thread publishes the checkpoint. One save is under way at a time: the next one waits for it.
"""

from __future__ import annotations

import contextlib
import copy
import secrets
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sas.config import Config
from megatron_sas.core import distributed
from megatron_sas.core.files import atomic_directory, remove
from megatron_sas.export.hf import write_hf
from megatron_sas.model.config import BertConfig
from megatron_sas.run.checkpoint import (
    Share,
    checkpoint_name,
    gather_share,
    partial_directory,
    publish,
    refuse_nonfinite,
    remove_leftovers,
    remove_old_checkpoints,
    write_description,
    write_share,
)
from megatron_sas.run.reading import checkpoints_directory
from megatron_sas.train.step import Engine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Saver:
    """Writes the checkpoints and snapshots of one run. Its methods are called on all ranks alike."""

    def __init__(
        self, config: Config, engine: Engine, bert_config: BertConfig, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.config, self.engine, self.bert_config, self.tokenizer = config, engine, bert_config, tokenizer
        self.run_dir = Path(config.run.output_dir)
        self.step: int | None = None  # of the newest checkpoint that was begun
        self.published = -1  # step of the newest that is whole; rank 0
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._token = distributed.broadcast_object(secrets.token_hex(4))  # the same for all ranks of this start
        self._where = self.run_dir  # for messages
        self._unpublished: int | None = None  # step of a checkpoint that is being written
        self._writing: Future | None = None
        self._publishing: Future | None = None  # rank 0
        self.removed = remove_leftovers(self.run_dir) if distributed.is_main() else []

    def begin(self, step: int, state: dict[str, Any], *, checkpoint: bool, snapshot: str | None) -> None:
        """Gather what is to be saved and start writing it. A collective.

        `snapshot` is the directory, in the run's, for the model alone; None: no snapshot.

        Raises:
            OSError: on every rank, when the save before this one failed on any.
        """
        self.finish()
        share = gather_share(self.engine, step, with_moments=checkpoint)
        jobs: list[Callable[[], None]] = [partial(refuse_nonfinite, share)]
        if snapshot is not None:
            self._where = self.run_dir / snapshot / checkpoint_name(step)
            if distributed.is_main():
                jobs.append(partial(self._write_snapshot, self._where, step, share))
        if checkpoint:
            directory = self._partial(step)
            self._where = checkpoints_directory(self.run_dir) / checkpoint_name(step)
            self.step = self._unpublished = step
            jobs.append(partial(write_share, directory, share))
            if distributed.is_main():
                yaml = self.config.to_yaml()
                jobs.append(partial(write_description, directory, self.bert_config, self.tokenizer, step, state, yaml))
        self._writing = self._executor.submit(_run_all, jobs)

    def flags(self) -> tuple[int, int]:
        """Whether this rank has written its part, and whether it has failed; to be summed over the ranks."""
        done = [work for work in (self._writing, self._publishing) if work is not None and work.done()]
        failed = any(work.exception() is not None for work in done)
        written = self._writing in done and not failed
        return int(written), int(failed)

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
        """Wait for this rank's thread; whether it failed, the others learn as always."""
        for work in (self._writing, self._publishing):
            if work is not None:
                work.exception()

    def _partial(self, step: int) -> Path:
        return partial_directory(self.run_dir, step, self._token)

    def _start_publishing(self) -> None:
        if distributed.is_main() and self._unpublished is not None and self._publishing is None:
            self._publishing = self._executor.submit(self._publish, self._unpublished)

    def _publish(self, step: int) -> None:
        publish(self._partial(step), step)
        self.published = step
        section = self.config.checkpoint
        if section.kept is not None:
            remove_old_checkpoints(self.run_dir, step, section.kept, section.keep_every)

    def _write_snapshot(self, path: Path, step: int, share: Share) -> None:
        tokenizer = copy.deepcopy(self.tokenizer)  # writing it for other programs changes it
        with atomic_directory(path, overwrite=True) as directory:
            write_hf(directory, self.bert_config, share.weights, tokenizer, self.config.snapshots.dtype, step)

    def _together(self, work: Future | None) -> None:
        """Wait for `work` on all ranks, and raise on all if it failed on any."""
        error = None if work is None else work.exception()
        fault = None if error is None else f"rank {distributed.rank()}: {error}"
        if faults := [f for f in distributed.gather_objects(fault) if f]:
            raise OSError(f"{self._where}: could not be written ({faults[0]})")


def _run_all(jobs: list[Callable[[], None]]) -> None:
    for job in jobs:
        job()
