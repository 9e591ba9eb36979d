"""Updates whose results are still on the device, and what their records say once they are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron_sas.core import distributed
from megatron_sas.objective.base import Counts, Term
from megatron_sas.optim.section import TrainSection
from megatron_sas.train.step import UpdateResult


@dataclass
class PendingUpdate:
    """One update whose sums are still on the device."""

    step: int  # completed updates, this one included
    result: UpdateResult
    weights: Mapping[str, float]  # λ of every term of the run
    learning_rate: float


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
    for (name, term), total, edges in zip(terms.items(), sums[1::2], sums[2::2], strict=True):
        if name in entry.result.term_sums:
            counts = Counts(train.global_batch_size, train.global_batch_size / train.micro_batch_size, int(edges))
            values |= term.metrics(total, counts)
            values["loss"] += entry.weights[name] * values[name]
    return values


def describe(values: Mapping[str, Any], terms: Mapping[str, Term]) -> str:
    """An update's record as a line, with the attention per edge and λ of every term."""
    text = f"loss {values['loss']:.4f}  mlm {values['mlm_loss']:.4f}"
    for name in terms:
        if f"{name}_per_edge" in values:
            text += f"  {name}/edge {values[f'{name}_per_edge']:.4f}"
        text += f"  λ {values[f'{name}_weight']:g}"
    return text + f"  lr {values['lr']:.2e}  {values['tokens_per_second']:,.0f} tokens/s"
