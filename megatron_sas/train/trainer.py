"""The training loop: update, then let the collaborators log, evaluate and save."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_sas.config import Config
from megatron_sas.core import distributed
from megatron_sas.core.directory_lock import DirectoryLock
from megatron_sas.core.distributed import on_all_ranks
from megatron_sas.data.loader import PrefetchLoader
from megatron_sas.data.mlm_dataset import Window
from megatron_sas.launch.environment import join_processes
from megatron_sas.launch.watchdog import Watchdog
from megatron_sas.objective.terms import weights
from megatron_sas.run.checkpoint import RankSlice, write_slice
from megatron_sas.run.directory import RunDirectory
from megatron_sas.run.signals import StopRequest, mark_for_requeue
from megatron_sas.train.build import build_run, claim_old_run, open_records
from megatron_sas.train.checks import check_shared_directory
from megatron_sas.train.collaborator import Collaborator
from megatron_sas.train.evaluations import Evaluations
from megatron_sas.train.journal import Journal
from megatron_sas.train.saves import Saves
from megatron_sas.train.step_log import PendingUpdate, StepLog
from megatron_sas.train.stop_vote import StopVote


class Trainer:
    """A run: built from its configuration, continued from its newest checkpoint if there is one."""

    def __init__(
        self,
        config: Config,
        stop: StopRequest | None = None,
        *,
        clock: Callable[[], float] = time.perf_counter,
        observer: Callable[[int, dict[str, Any]], None] | None = None,
        write: Callable[[Path, RankSlice], None] = write_slice,
    ) -> None:
        """Join the process group and build everything.

        Args:
            config: what to do.
            stop: where requests to stop arrive; None: only as a file.
            clock: counts seconds.
            observer: called with the step and values of every update's record before it is written; may change them.
            write: writes this rank's tensors of a checkpoint into a directory, in a thread.

        Raises:
            InputError: anything that the user must mend; a CommonError where every rank raises it.
        """
        request, directory = stop or StopRequest(), RunDirectory(config.run.output_dir)
        device = join_processes(config.run.timeout_minutes, config.train.deterministic)
        check_shared_directory(directory.path)
        # Rank 0's; two runs in one directory would overwrite each other's records and saves.
        remedy = f"wait for it, or create the file {directory.stop} to have it save and end"
        self.lock, self.journal = DirectoryLock(directory.path, remedy), Journal()
        on_all_ranks(lambda: claim_old_run(directory, self.lock, request))
        self.built = built = build_run(config, device, self.journal.log, self.lock, clock, write)
        self.config, self.engine, self.last_step = config, built.engine, config.train.steps
        self.watchdog = Watchdog(config.run.timeout_minutes)
        ring = on_all_ranks(lambda: open_records(built, self.journal))
        self.vote = StopVote(request, directory, device)
        self.log = StepLog(built, self.journal, observer)
        self.evaluations = Evaluations(built, self.journal, self.vote, self.watchdog, self.log.flush)
        self.saves = Saves(built, self.log, self.watchdog, self._state_dict, ring)
        self.collaborators: list[Collaborator] = [self.vote, self.log, self.evaluations, self.saves]
        for collaborator in self.collaborators:
            collaborator.load_state_dict(built.state.counters)

    def run(self) -> None:
        """Train to the last step, or until asked to stop.

        Raises:
            InputError: too many updates in a row were not finite; on every rank.
            OSError: a checkpoint could not be written, on every rank; or data could not be read, maybe on one.
        """
        step, state = self.built.state.start_step, self.built.state
        self.built.announce(self.journal)
        with contextlib.closing(self.lock), self.watchdog:
            if step == self.last_step or not self.vote.decide():  # a request may have come while the run was built
                for collaborator in self.collaborators:
                    collaborator.begin(step, resumed=state.checkpoint is not None)
            pinned = self.engine.device.type == "cuda"
            with (
                PrefetchLoader(state.dataset, step, self.last_step, pin_memory=pinned) as loader,
                self.journal.progress(step, self.last_step),
            ):
                while step < self.last_step and not self.vote.stopping:
                    self.watchdog.beat(f"reading the data of update {step + 1}")
                    step = self._update(next(loader))
                    for collaborator in self.collaborators:
                        collaborator.after_update(step)
            self._end(step)

    def _update(self, window: Window) -> int:
        """One update; returns how many are done now."""
        step = window.step + 1
        self.watchdog.beat(f"update {step}")
        weight, rate = weights(self.built.state.terms, window.step), self.config.train.schedule(window.step)
        self.engine.set_learning_rate(rate)
        flags = [collaborator.flags() for collaborator in self.collaborators]
        # With λ = 0 a term costs a little and changes nothing, so it is measured only where the line is written.
        result = self.engine.update(window, weight, self.log.writes(step), [flag for group in flags for flag in group])
        sums = iter(result.flags)
        for collaborator, group in zip(self.collaborators, flags, strict=True):
            collaborator.react(*(next(sums) for _ in group))
        masking_rate = None if self.config.masking.rate is None else self.config.masking.rate(window.step)
        self.log.add(PendingUpdate(step, result, weight, rate, masking_rate))
        return step

    def _end(self, step: int) -> None:
        """Everything on the disk; then report whether the run is finished or wants to be started again."""
        self.watchdog.beat("the last checkpoint")
        if step == self.last_step and not self.evaluations.owed:
            self.built.saver.finish()
            self.journal.event(step, event="finished")
            line = f"finished after {step} updates; the run is in {self.built.directory.path}"
        else:
            reason = self.vote.reason()
            if step != self.built.state.start_step:
                self.saves.save_last(step)
            self.built.saver.finish()
            self.journal.event(step, event="stopped", reason=reason)
            on_all_ranks(lambda: mark_for_requeue(self.built.directory, reason) if distributed.is_main() else None)
            line = f"stopped after {step} updates ({reason}); start the same command again to continue"
        self.journal.close()
        self.lock.release()
        self.journal.log(line)

    def _state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps as well as tensors: the collaborators' counters, and what the run is made of."""
        state = self.built.facts()
        for collaborator in self.collaborators:
            state |= collaborator.state_dict()
        return state
