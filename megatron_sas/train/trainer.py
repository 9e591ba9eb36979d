"""The training loop: update, record, evaluate, save."""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from megatron_sas import __version__
from megatron_sas.config import Config
from megatron_sas.core import distributed
from megatron_sas.core.cli import listed, progress
from megatron_sas.core.directory_lock import DirectoryLock
from megatron_sas.data.mixture import stream_samples
from megatron_sas.data.mlm_dataset import PrefetchLoader, Window
from megatron_sas.evaluation.live import collapsed_attention, evaluation_line, evaluation_stride
from megatron_sas.launch.environment import (
    initialize_distributed,
    other_threads,
    share_cores,
    threads_of_processes,
    use_deterministic_algorithms,
)
from megatron_sas.launch.watchdog import Watchdog
from megatron_sas.objective.pretraining import MaskedLMWithTerms
from megatron_sas.objective.terms import weights
from megatron_sas.run.directory import RunDirectory
from megatron_sas.run.leftovers import leftovers
from megatron_sas.run.nvml import GpuMonitor
from megatron_sas.run.records import Records
from megatron_sas.run.signals import StopRequest, mark_for_requeue
from megatron_sas.run.throughput import memory
from megatron_sas.train.build import agreed, build_parts, data_facts, introduction, make_saver, measure_throughput
from megatron_sas.train.checks import check_shared_directory
from megatron_sas.train.onset_snapshots import Watch
from megatron_sas.train.skipped_updates import SkippedUpdates
from megatron_sas.train.step import Engine
from megatron_sas.train.step_log import PendingUpdate, describe, read_pending

VERSIONS = {"megatron_sas": __version__} | {name: version(name) for name in ("torch", "deepspeed", "transformers")}

COLLAPSE = "attention_collapsed"  # the event of a warning that a run gives once


class _Stopped(Exception):
    """An evaluation was given up, on all ranks, because the run shall stop."""


class Trainer:
    """A run: built from its configuration, continued from its newest checkpoint if there is one."""

    def __init__(self, config: Config, stop: StopRequest | None = None) -> None:
        """Join the process group and build everything.

        Args:
            config: what to do.
            stop: where requests to stop arrive; None: only as a file.

        Raises:
            InputError: anything that the user must mend; a CommonError where every rank raises it.
        """
        self.config, self.run_dir = config, Path(config.run.output_dir)
        self.directory = RunDirectory(self.run_dir)
        self.stop = stop or StopRequest()
        self.stopping = False  # all ranks have agreed to stop
        self.owes_evaluation = False  # the one at this step was given up for that
        device = initialize_distributed(config.run.timeout_minutes)
        share_cores()
        self.threads = threads_of_processes()
        if config.train.deterministic and device.type == "cuda":
            use_deterministic_algorithms()
        check_shared_directory(self.run_dir)
        # Rank 0's; two runs in one directory would overwrite each other's records and saves.
        remedy = f"wait for it, or create the file {self.directory.stop} to have it save and end"
        self.lock = DirectoryLock(self.run_dir, remedy)
        agreed(self._claim_old_run)
        parts = build_parts(config, self.say, self.lock)
        self.parts, self.dataset = parts, parts.dataset
        self.skipped = SkippedUpdates(config.train.max_nonfinite_updates, **parts.state.get("skipped", {}))
        self.terms = config.terms(parts.dataset.packed.tokenizer.special_ids)
        self.engine = Engine(MaskedLMWithTerms(parts.bert, self.terms), config.train, config.run.seed, device)
        if parts.checkpoint is not None:
            parts.load_optimizer(self.engine)
            self.say(parts.origin)
            if line := other_threads(parts.state.get("threads"), self.threads):
                self.say(line)
        self.saver = make_saver(config, self.engine, parts)
        self._say_what_was_left()
        self.watchdog = Watchdog(config.run.timeout_minutes)
        self.last_step = config.train.steps
        self.saved_at = time.monotonic()  # when the newest checkpoint was begun, or this start of the run
        self.save_now = False  # all ranks have agreed that a checkpoint is due by rank 0's clock
        self.throughput = measure_throughput(config, parts, device)
        self.records: Records | None = None
        self.watch: Watch | None = None
        agreed(self._open_records)
        self.gpu = GpuMonitor()
        self.pending: list[PendingUpdate] = []
        thinning = parts.state.get("thinning", {})  # of evaluations, where they take too much time
        self.evaluation_seconds: float = thinning.get("seconds", 0.0)  # of the last evaluation
        self.skipped_evaluations: int = thinning.get("skipped", 0)
        self.stride = 1
        self.bar = progress(disable=True)

    def _claim_old_run(self) -> None:
        if distributed.is_main() and self.directory.config.is_file():
            self.lock.take()
            self.stop.clear_marks(self.run_dir)

    def _open_records(self) -> None:
        """Rank 0's records, and what watches them."""
        if not distributed.is_main():
            return
        config, parts = self.config, self.parts
        resume_step = parts.start_step if parts.checkpoint is not None else -1
        self.records = Records(config.run.output_dir, resume_step, config.logging.tensorboard)
        if parts.branch is not None:
            self.records.show_past()
        if config.watch.metrics:
            own_step = parts.start_step if parts.checkpoint is not None and parts.branch is None else -1
            self.watch = Watch(config, own_step, self.records, self.saver, self.say)

    def _say_what_was_left(self) -> None:
        """By an earlier start that was killed; the saver has removed what was half-written."""
        for line in leftovers(self.lock):
            self.say(line)
        if removed := self.saver.removed:
            self.say(f"removed what was half-written: {listed([str(p.relative_to(self.run_dir)) for p in removed])}")

    def say(self, line: str) -> None:
        """Print a line on rank 0, above the progress bar if there is one."""
        if distributed.is_main():
            bar = getattr(self, "bar", None)
            if bar is not None and not bar.disable:
                bar.write(line, file=sys.stderr)
            else:
                print(line, flush=True)

    def run(self) -> None:
        """Train to the last step, or until asked to stop.

        Raises:
            InputError: too many updates in a row were not finite; on every rank.
            OSError: a checkpoint could not be written, on every rank; or data could not be read, maybe on one.
        """
        start = self.parts.start_step
        if self.parts.branch is not None:
            self._event(start, event="branched", parent=self.parts.branch.lineage["parent_run"])
        facts, line = introduction(self.config, self.parts, self.engine)
        self._event(start, event="start", versions=VERSIONS, threads=self.threads, **facts)
        self.say(line)
        for name, unknown in self.parts.evaluation.unknown().items():
            if unknown.is_high:
                self.say(unknown.line(name))
        quiet = not distributed.is_main() or not sys.stderr.isatty()
        with contextlib.closing(self.lock), self.watchdog:
            self.stopping = start < self.last_step and self._anyone_asked_to_stop()  # while the run was being built
            if not self.stopping:
                self._after_update(start, resumed=self.parts.checkpoint is not None)
            pinned = self.engine.device.type == "cuda"
            with (
                PrefetchLoader(self.dataset, start, self.last_step, pin_memory=pinned) as loader,
                progress(total=self.last_step, initial=start, unit="step", disable=quiet) as self.bar,
            ):
                step = start
                while step < self.last_step and not self.stopping:
                    self.watchdog.beat(f"reading the data of update {step + 1}")
                    step = self._update(next(loader))
                    self.bar.update()
                    if step % self.config.logging.every == 0 or step == self.last_step:
                        self._write_pending()
                    self._after_update(step)
            self._end(step)

    def _end(self, step: int) -> None:
        """Everything on the disk; then say whether the run is finished or wants to be started again."""
        self.watchdog.beat("the last checkpoint")
        if step == self.last_step and not self.owes_evaluation:
            self.saver.finish()
            self._event(step, event="finished")
            line = f"finished after {step} updates; the run is in {self.run_dir}"
        else:
            reasons = [r for r in distributed.gather_objects(self.stop.reason) if r is not None]
            if step != self.saver.step and step != self.parts.start_step:
                self._write_pending()
                self._save(step, checkpoint=True, snapshot=False)
            self.saver.finish()
            self._event(step, event="stopped", reason=reasons[0])
            agreed(lambda: mark_for_requeue(self.run_dir, reasons[0]) if distributed.is_main() else None)
            line = f"stopped after {step} updates ({reasons[0]}); start the same command again to continue"
        if self.records is not None:
            self.records.close()
        self.lock.release()
        self.say(line)

    def _update(self, window: Window) -> int:
        """One update; returns how many are done now."""
        config, step = self.config, window.step
        self.watchdog.beat(f"update {step + 1}")
        weight, rate = weights(self.terms, step), config.train.schedule(step)
        self.engine.set_learning_rate(rate)
        # With λ = 0 a term costs a little and changes nothing, so it is measured only where the line is written.
        measure = (step + 1) % config.logging.every == 0 or step + 1 == self.last_step
        flags = [self._asked_to_stop(), self._long_unsaved(), *self.saver.flags()]
        result = self.engine.update(window, weight, measure, flags)
        asked, unsaved, written, failed = result.flags
        self.stopping, self.save_now = asked > 0, unsaved > 0
        self.saver.react(written, failed)
        self.pending.append(PendingUpdate(step + 1, result, weight, rate))
        self.throughput.add(config.train.global_batch_size * self.dataset.packed.seq_length)
        return step + 1

    def _asked_to_stop(self) -> bool:
        if distributed.is_main():
            self.stop.look_for_file(self.run_dir)
        return self.stop.reason is not None

    def _long_unsaved(self) -> bool:
        """Whether a checkpoint is due by the clock, which is rank 0's."""
        seconds = self.config.checkpoint.seconds
        return distributed.is_main() and seconds is not None and time.monotonic() - self.saved_at >= seconds

    def _between_batches(self) -> None:
        """Called after each forward of an evaluation: all ranks agree on whether to give it up."""
        self.watchdog.beat("an evaluation")
        if self._anyone_asked_to_stop():
            raise _Stopped

    def _anyone_asked_to_stop(self) -> bool:
        asked = distributed.all_reduce_sum_(torch.tensor(int(self._asked_to_stop()), device=self.engine.device))
        return int(asked) > 0

    def _write_pending(self, speed: bool = True) -> None:
        """Read the collected updates off the device at once, and write a record for each.

        Without `speed` the last one does not show how fast training was since it was shown last.
        """
        if not self.pending:
            return
        lines = read_pending(self.pending, self.terms, self.config.train, self.engine.device)
        if speed:
            lines[-1] |= self.throughput.window() | memory() | self.gpu.read()
        for entry, values in zip(self.pending, lines, strict=True):
            self._record("train", entry.step, values)
        if speed:
            self._show(self.pending[-1].step, lines[-1])
        self._look_for_skipped(lines)
        self.pending.clear()

    def _look_for_skipped(self, lines: list[dict[str, Any]]) -> None:
        size, seed = self.config.train.global_batch_size, self.config.run.seed
        for entry, values in zip(self.pending, lines, strict=True):
            if self.skipped.count(values["grad_norm"]):
                samples = stream_samples(self.dataset.packed, entry.step - 1, size, seed)[0].tolist()
                loss = values["mlm_loss"]
                self._event(entry.step, event="skipped_update", total=self.skipped.total, samples=samples)
                self.say(f"step {entry.step}: update skipped (loss {loss:.4f}, gradient norm {values['grad_norm']:g})")
                if self.skipped.at_limit:
                    self.saver.finish()  # the checkpoint from before may still be under way
                    self.skipped.refuse(entry.step)

    def _show(self, step: int, values: dict[str, Any]) -> None:
        text = describe(values, self.terms)
        if self.bar.disable:
            self.say(f"step {step:>{len(str(self.last_step))}}/{self.last_step}  {text}")
        else:
            self.bar.set_postfix_str(text, refresh=False)

    def _after_update(self, step: int, resumed: bool = False) -> None:
        """Evaluate and save where the schedule says so; a resumed run has its checkpoint, and maybe its evaluation."""
        evaluated = resumed and distributed.broadcast_object(
            self.records is not None and self.records.has("evaluation", step)
        )
        if self.config.evaluation.due(step, self.last_step) and not evaluated and self._time_for_evaluation(step):
            self._evaluate(step)
        checkpoint = self.config.checkpoint.due(step, self.last_step)
        snapshot = self.config.snapshots.due(step, self.last_step) or self.config.watch.due(step)
        if not resumed and (checkpoint or snapshot or self.save_now):
            # When the clock asks, nothing but the time may show in the records.
            self._write_pending(speed=checkpoint or snapshot)
            self._save(step, checkpoint or self.save_now, snapshot)

    def _save(self, step: int, checkpoint: bool, snapshot: bool) -> None:
        """Begin to write what is due.

        While updates are being skipped there is no checkpoint, so that the newest is from before the trouble; only the
        last step always has one.
        """
        checkpoint = checkpoint and (self.skipped.in_a_row == 0 or step == self.last_step)
        if not (checkpoint or snapshot):
            return
        self.watchdog.beat(f"the checkpoint of step {step}")
        if self.records is not None:
            self.records.flush()  # a checkpoint has all records before it
        with self.throughput.paused():
            state = {
                "tokens": self.throughput.tokens,
                "seconds": self.throughput.seconds,
                "skipped": self.skipped.state(),
                "thinning": {"seconds": self.evaluation_seconds, "skipped": self.skipped_evaluations},
                "versions": VERSIONS,
                "threads": self.threads,
                "tokenizer": asdict(self.parts.identity),
                "data": data_facts(self.dataset.packed, self.parts.evaluation.validation),
                "lineage": self.parts.state.get("lineage", []),
            }
            directory = self.directory.snapshots
            if snapshot and self.watch is not None:
                directory = self.watch.place(step)
            if checkpoint:
                self.saved_at = time.monotonic()
            self.saver.begin(step, state, checkpoint=checkpoint, snapshot=directory if snapshot else None)

    def _time_for_evaluation(self, step: int) -> bool:
        """Whether to evaluate now, given the share of time that evaluations may take; rank 0 decides for all."""
        section, done = self.config.evaluation, step - self.parts.start_step
        if step in (0, self.last_step) or self.evaluation_seconds == 0.0:
            return True
        if done == 0:  # a resumed run's own checkpoint was saved after this was decided
            return self.skipped_evaluations == 0
        self._write_pending()  # brings the clock up to date
        each_update = (self.throughput.seconds - self.parts.state["seconds"]) / done
        left = sum(section.due(s, self.last_step) for s in range(step, self.last_step + 1))
        stride = evaluation_stride(
            left, self.evaluation_seconds, each_update * (self.last_step - step), section.max_time_share
        )
        stride = distributed.broadcast_object(stride)
        if stride != self.stride and stride > 1:
            self.say(
                f"step {step}: evaluations take {self.evaluation_seconds:.1f} s each, more than "
                f"{section.max_time_share:.0%} of the time left; only every {stride}. is made"
            )
        self.stride = stride
        self.skipped_evaluations += 1
        return self.skipped_evaluations >= stride

    def _evaluate(self, step: int) -> None:
        self._write_pending()
        self.skipped_evaluations = 0
        try:
            with self.throughput.paused(), self.engine.evaluation():
                values = self.parts.evaluation.evaluate(self.engine.bert, self._between_batches)
                values["weight_norm"] = self.engine.weight_norm()
        except _Stopped:  # the resumed run makes this evaluation
            self.stopping = self.owes_evaluation = True
            return
        self.evaluation_seconds = values["seconds"]
        self._record("evaluation", step, values)
        if shown := evaluation_line(values):
            width, seconds = len(str(self.last_step)), values["seconds"]
            self.say(f"step {step:>{width}}/{self.last_step}  evaluation: {shown}  ({seconds:.1f} s)")
        self._warn_of_collapse(step, values)

    def _warn_of_collapse(self, step: int, values: dict[str, Any]) -> None:
        """Say once in a run, and record, that the regularizer takes attention away from nearly everything."""
        active = {name: weight for name, weight in weights(self.terms, step - 1).items() if weight} if step else {}
        attention = collapsed_attention(values)
        if self.records is None or not active or attention is None or self.records.has_event(COLLAPSE):
            return
        under = ", ".join(f"{name} λ = {weight:g}" for name, weight in active.items())  # of the last update
        entropy, largest = attention["entropy"]["mean"], attention["uniform_entropy"]
        special = attention["to_cls"]["mean"] + attention["to_sep"]["mean"]
        self._event(step, event=COLLAPSE, entropy=entropy, to_special=special, heads=attention["collapsed_heads"])
        self.say(
            f"step {step}: warning: attention has collapsed under {under}: its entropy is {entropy:.2f} of at "
            f"most {largest:.2f} nats, and {special:.0%} of it goes to [CLS] and [SEP], so more is suppressed than "
            "syntax; try a smaller λ"
        )

    def _event(self, step: int, **values: Any) -> None:
        self._record("event", step, values)

    def _record(self, kind: str, step: int, values: dict[str, Any]) -> None:
        if self.records is not None:
            self.records.write(kind, step, values)
        if self.watch is not None:
            self.watch.observe(kind, step, values)
