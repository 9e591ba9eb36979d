"""Updates whose results are still on the device, and what their records say once they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron_sas.core import distributed
from megatron_sas.objective.base import EDGES, Counts, Term
from megatron_sas.optim.section import TrainSection
from megatron_sas.run.nvml import GpuMonitor
from megatron_sas.run.records import LoggingSection
from megatron_sas.run.throughput import Throughput, memory
from megatron_sas.train.collaborator import Collaborator
from megatron_sas.train.journal import Journal
from megatron_sas.train.skipped_updates import SkippedUpdates
from megatron_sas.train.step import UpdateResult


@dataclass
class PendingUpdate:
    """One update whose sums are still on the device."""

    step: int  # completed updates, this one included
    result: UpdateResult
    weights: Mapping[str, float]  # λ of every term of the run
    learning_rate: float
    masking_rate: float | None = None  # where the configuration has one


class StepLog(Collaborator):
    """Collects updates, and reads their results off the device together."""

    def __init__(
        self,
        section: LoggingSection,
        train: TrainSection,
        terms: Mapping[str, Term],
        journal: Journal,
        throughput: Throughput,
        skipped: SkippedUpdates,
        device: torch.device,
        observer: Callable[[int, dict[str, Any]], None] | None = None,
    ) -> None:
        """`observer` is called with the step and values of every record before it is written, and may change them."""
        self.section, self.train, self.terms, self.journal = section, train, terms, journal
        self.throughput, self.skipped, self.device, self.observer = throughput, skipped, device, observer
        self.gpu = GpuMonitor()
        self._pending: list[PendingUpdate] = []

    def writes(self, step: int) -> bool:
        """Whether the records up to `step` are written after that update."""
        return step % self.section.every == 0 or step == self.train.steps

    def add(self, update: PendingUpdate, tokens: int) -> None:
        """Collect an update that has trained on `tokens` tokens of the global batch."""
        self._pending.append(update)
        self.throughput.add(tokens)

    def after_update(self, step: int) -> None:
        """Write the records, every so many steps."""
        self.journal.advance()
        if self.writes(step):
            self.flush()

    def flush(self, speed: bool = True) -> None:
        """Read the collected updates off the device at once, and write a record for each. A collective.

        Without `speed` the last one does not show how fast training was since it was shown last.
        """
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        lines = read_pending(pending, self.terms, self.train, self.device)
        if speed:
            lines[-1] |= self.throughput.window() | memory() | self.gpu.read()
        for entry, values in zip(pending, lines, strict=True):
            if self.observer is not None:
                self.observer(entry.step, values)
            self.journal.record("train", entry.step, values)
        if speed:
            self.journal.show(pending[-1].step, self.train.steps, describe(lines[-1], self.terms))
        for entry, values in zip(pending, lines, strict=True):
            self.skipped.look(entry.step, values)

    def state_dict(self) -> dict[str, Any]:
        """Tokens and seconds of training so far."""
        return {"tokens": self.throughput.tokens, "seconds": self.throughput.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting."""
        self.throughput.tokens, self.throughput.seconds = state["tokens"], state["seconds"]


def read_pending(
    pending: list[PendingUpdate], terms: Mapping[str, Term], train: TrainSection, device: torch.device
) -> list[dict[str, Any]]:
    """The values of each update's record, read off the device at once and summed over all ranks. A collective."""
    results = [p.result for p in pending]
    none = torch.zeros((), device=device)
    rows = [
        [r.mlm_sum, *(part.get(name, none) for name in terms for part in (r.term_sums, r.edge_counts))] for r in results
    ]
    sums = distributed.all_reduce_sum_(torch.stack([torch.stack([x.double() for x in row]) for row in rows]))
    norms = torch.stack([r.grad_norm.double() for r in results])
    masked = torch.stack([r.num_masked for r in results])
    columns = zip(pending, sums.tolist(), norms.tolist(), masked.tolist(), strict=True)
    return [_values(terms, train, *column) for column in columns]


def _values(
    terms: Mapping[str, Term], train: TrainSection, entry: PendingUpdate, sums: list[float], norm: float, masked: int
) -> dict[str, Any]:
    mlm_loss = sums[0] / max(masked, 1)
    values = {
        "loss": mlm_loss,
        "mlm_loss": mlm_loss,
        **{f"{name}_weight": weight for name, weight in entry.weights.items()},
        "lr": entry.learning_rate,
        "grad_norm": norm,
    }
    if entry.masking_rate is not None:
        values["masking_rate"] = entry.masking_rate
    for (name, term), total, edges in zip(terms.items(), sums[1::2], sums[2::2], strict=True):
        if name in entry.result.term_sums:
            counts = Counts(train.global_batch_size, train.global_batch_size / train.micro_batch_size, int(edges))
            values |= term.metrics(total, counts)
            values["loss"] += entry.weights[name] * values[name]
    return values


def describe(values: Mapping[str, Any], terms: Mapping[str, Term]) -> str:
    """An update's record as a line, with the attention per edge, or R, and λ of every term."""
    text = f"loss {values['loss']:.4f}  mlm {values['mlm_loss']:.4f}"
    for name in terms:
        if f"{name}_per_edge" in values:
            text += f"  {name}/edge {values[f'{name}_per_edge']:.3g}"
        elif name in values and EDGES not in terms[name].needs:
            text += f"  {name} {values[name]:.3g}"
        text += f"  λ {values[f'{name}_weight']:g}"
    return text + f"  lr {values['lr']:.2e}  {values['tokens_per_second']:,.0f} tokens/s"
