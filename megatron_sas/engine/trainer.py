"""The training loop: update, record, evaluate, save."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from megatron_sas import __version__, distributed
from megatron_sas.cli import progress
from megatron_sas.config import Config
from megatron_sas.data.mlm_dataset import PrefetchLoader, Window
from megatron_sas.engine.checkpoint import load_moments, save_checkpoint
from megatron_sas.engine.engine import Engine, UpdateResult
from megatron_sas.engine.environment import initialize_distributed
from megatron_sas.engine.learning_rate import learning_rate
from megatron_sas.engine.setup import build_parts, data_facts
from megatron_sas.evaluation.live import evaluation_stride
from megatron_sas.metrics.nvml import GpuMonitor
from megatron_sas.metrics.records import Records
from megatron_sas.metrics.throughput import Throughput, flops_per_token, memory, peak_flops
from megatron_sas.objective.pretraining import MaskedLMWithSas
from megatron_sas.objective.schedule import sas_weight

VERSIONS = {"megatron_sas": __version__} | {name: version(name) for name in ("torch", "deepspeed", "transformers")}


@dataclass
class _Pending:
    """One update whose sums are still on the device."""

    step: int  # completed updates, this one included
    result: UpdateResult
    num_edges: int
    sas_weight: float
    learning_rate: float


class Trainer:
    """A run: built from its configuration, continued from its newest checkpoint if there is one."""

    def __init__(self, config: Config) -> None:
        """Join the process group and build everything.

        Raises:
            InputError: anything that the user must mend, the same on every rank.
        """
        self.config = config
        device = initialize_distributed()
        parts = build_parts(config, self.say)
        self.parts, self.dataset = parts, parts.dataset
        self.engine = Engine(MaskedLMWithSas(parts.bert, config.sas_objective()), config.train, config.run.seed, device)
        if parts.checkpoint is not None:
            load_moments(self.engine, parts.checkpoint, parts.start_step)
            self.say(f"continuing from {parts.checkpoint}")
        self.last_step = config.train.steps
        self.throughput = Throughput(
            tokens=parts.state["tokens"],
            seconds=parts.state["seconds"],
            flops_per_token=self._flops_per_token(),
            peak_flops=self._peak_flops(device),
        )
        self.records: Records | None = None
        if distributed.is_main():
            resume_step = parts.start_step if parts.checkpoint is not None else -1
            self.records = Records(config.run.output_dir, resume_step, config.logging.tensorboard)
        self.gpu = GpuMonitor()
        self.pending: list[_Pending] = []
        self.evaluation_seconds = 0.0  # of the last evaluation
        self.skipped_evaluations = 0
        self.stride = 1
        self.bar = progress(disable=True)

    def say(self, line: str) -> None:
        """Print a line on rank 0, above the progress bar if there is one."""
        if distributed.is_main():
            bar = getattr(self, "bar", None)
            if bar is not None and not bar.disable:
                bar.write(line, file=sys.stderr)
            else:
                print(line, flush=True)

    def run(self) -> None:
        """Train to the last step. Evaluations and checkpoints happen between updates, on every rank alike."""
        config, start = self.config, self.parts.start_step
        self._introduce()
        self._after_update(start, resumed=self.parts.checkpoint is not None)
        cuda = self.engine.device.type == "cuda"
        disabled = not distributed.is_main() or not sys.stderr.isatty()
        with (
            PrefetchLoader(self.dataset, start, self.last_step, pin_memory=cuda) as loader,
            progress(total=self.last_step, initial=start, unit="step", disable=disabled) as self.bar,
        ):
            for window in loader:
                self._update(window)
                step = window.step + 1
                self.bar.update()
                if step % config.logging.every == 0 or step == self.last_step:
                    self._write_pending()
                self._after_update(step)
        self._event(self.last_step, event="finished")
        if self.records is not None:
            self.records.close()
        self.say(f"finished after {self.last_step} updates; the run is in {config.run.output_dir}")

    def _update(self, window: Window) -> None:
        config, step = self.config, window.step
        weight = sas_weight(config.sas.schedule, step)
        rate = learning_rate(
            step,
            peak=config.train.learning_rate,
            warmup_steps=config.train.warmup_steps,
            decay_horizon=config.train.decay_horizon,
        )
        self.engine.set_learning_rate(rate)
        # With λ = 0 the term costs a little and changes nothing, so it is measured only where the line is written.
        measure = (step + 1) % config.logging.every == 0 or step + 1 == self.last_step
        result = self.engine.update(window, weight, measure)
        edges = sum(int((batch.heads >= 0).sum()) for batch in window.micro_batches)
        self.pending.append(_Pending(step + 1, result, edges, weight, rate))
        self.throughput.add(config.train.global_batch_size * self.dataset.packed.seq_length)

    def _write_pending(self) -> None:
        """Read the collected updates off the device at once, and write a record for each."""
        if not self.pending:
            return
        results = [p.result for p in self.pending]
        rows = [torch.stack([r.mlm_sum, r.mlm_sum.new_zeros(()) if r.sas_sum is None else r.sas_sum]) for r in results]
        sums = distributed.all_reduce_sum_(torch.stack(rows).double())
        edges = distributed.all_reduce_sum_(
            torch.tensor([p.num_edges for p in self.pending], device=self.engine.device)
        )
        norms = torch.stack([p.result.grad_norm.double() for p in self.pending])
        masked = torch.stack([p.result.num_masked for p in self.pending])
        columns = zip(self.pending, sums.tolist(), edges.tolist(), norms.tolist(), masked.tolist(), strict=True)
        lines = [self._values(*column) for column in columns]
        lines[-1] |= self.throughput.window() | memory() | self.gpu.read()
        if self.records is not None:
            for entry, values in zip(self.pending, lines, strict=True):
                self.records.write("train", entry.step, values)
        self._show(self.pending[-1].step, lines[-1])
        self.pending.clear()

    def _values(self, entry: _Pending, sums: list[float], edges: int, norm: float, masked: int) -> dict[str, Any]:
        train, sas = self.config.train, self.config.sas
        mlm_loss = sums[0] / max(masked, 1)
        values = {
            "loss": mlm_loss,
            "mlm_loss": mlm_loss,
            "sas_weight": entry.sas_weight,
            "lr": entry.learning_rate,
            "grad_norm": norm,
        }
        if entry.result.sas_sum is not None:
            micro_batches = train.global_batch_size / train.micro_batch_size
            values["sas"] = sums[1] / (train.global_batch_size if sas.reduction == "sequence" else micro_batches)
            values["loss"] += entry.sas_weight * values["sas"]
            if sas.mode == "max" and edges:
                directions = 2 if sas.directions == "both" else 1
                values["sas_per_edge"] = sums[1] / (directions * edges)
        return values

    def _show(self, step: int, values: dict[str, Any]) -> None:
        text = f"loss {values['loss']:.4f}  mlm {values['mlm_loss']:.4f}"
        if "sas_per_edge" in values:
            text += f"  sas/edge {values['sas_per_edge']:.4f}"
        text += f"  λ {values['sas_weight']:g}  lr {values['lr']:.2e}  {values['tokens_per_second']:,.0f} tokens/s"
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
        if self.config.checkpoint.due(step, self.last_step) and not resumed:
            self._write_pending()
            with self.throughput.paused():
                state = {
                    "tokens": self.throughput.tokens,
                    "seconds": self.throughput.seconds,
                    "versions": VERSIONS,
                    "data": data_facts(self.dataset.packed),
                }
                yaml = self.config.to_yaml()
                save_checkpoint(self.config.run.output_dir, self.engine, self.parts.tokenizer, step, state, yaml)

    def _time_for_evaluation(self, step: int) -> bool:
        """Whether to evaluate now, given the share of time that evaluations may take; rank 0 decides for all."""
        section, done = self.config.evaluation, step - self.parts.start_step
        if step in (0, self.last_step) or done == 0 or self.evaluation_seconds == 0.0:
            return True
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
        with self.throughput.paused(), self.engine.evaluation():
            values = self.parts.evaluation.evaluate(self.engine.bert)
            values["weight_norm"] = self.engine.weight_norm()
        self.evaluation_seconds = values["seconds"]
        if self.records is not None:
            self.records.write("evaluation", step, values)
        names = {"validation_mlm_loss": "validation mlm", "uas": "uas", "blimp": "blimp"}
        shown = "  ".join(f"{label} {values[name]:.4f}" for name, label in names.items() if name in values)
        if shown:
            width, seconds = len(str(self.last_step)), values["seconds"]
            self.say(f"step {step:>{width}}/{self.last_step}  evaluation: {shown}  ({seconds:.1f} s)")

    def _event(self, step: int, **values: Any) -> None:
        if self.records is not None:
            self.records.write("event", step, values)

    def _introduce(self) -> None:
        train, packed, world_size = self.config.train, self.dataset.packed, distributed.world_size()
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in self.engine.bert.parameters())
        device = self.engine.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        self._event(
            self.parts.start_step,
            event="start",
            world_size=world_size,
            device=name,
            parameters=parameters,
            versions=VERSIONS,
        )
        self.say(
            f"megatron_sas {__version__}: {parameters:,} parameters, {packed.num_sequences:,} sequences of "
            f"{packed.seq_length}, {world_size} × {name}, ZeRO-{train.zero_stage}, {train.precision}, "
            f"batch {train.global_batch_size} = {world_size} × {train.micro_batch_size} × {self.dataset.accumulation}"
        )

    def _flops_per_token(self) -> float:
        bert = self.parts.bert.config
        return flops_per_token(
            num_layers=bert.num_layers,
            hidden_size=bert.hidden_size,
            intermediate_size=bert.intermediate_size,
            vocab_size=bert.vocab_size,
            seq_length=self.dataset.packed.seq_length,
            mask_prob=self.config.data.mask_prob,
        )

    def _peak_flops(self, device: torch.device) -> float | None:
        if device.type != "cuda":
            return None
        dtype = torch.bfloat16 if self.config.train.precision == "bf16" else torch.float32
        peak = peak_flops(torch.cuda.get_device_name(device), dtype)
        return None if peak is None else peak * distributed.world_size()
