"""Updates whose results are still on the device, and what their records say once they are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megatron_sas.config import Config
from megatron_sas.core import distributed
from megatron_sas.train.step import UpdateResult


@dataclass
class PendingUpdate:
    """One update whose sums are still on the device."""

    step: int  # completed updates, this one included
    result: UpdateResult
    num_edges: int
    sas_weight: float
    learning_rate: float


def read_pending(pending: list[PendingUpdate], config: Config, device: torch.device) -> list[dict[str, Any]]:
    """The values of each update's record, read off the device at once and summed over all ranks. A collective."""
    results = [p.result for p in pending]
    rows = [torch.stack([r.mlm_sum, r.mlm_sum.new_zeros(()) if r.sas_sum is None else r.sas_sum]) for r in results]
    sums = distributed.all_reduce_sum_(torch.stack(rows).double())
    edges = distributed.all_reduce_sum_(torch.tensor([p.num_edges for p in pending], device=device))
    norms = torch.stack([r.grad_norm.double() for r in results])
    masked = torch.stack([r.num_masked for r in results])
    columns = zip(pending, sums.tolist(), edges.tolist(), norms.tolist(), masked.tolist(), strict=True)
    return [_values(config, *column) for column in columns]


def _values(
    config: Config, entry: PendingUpdate, sums: list[float], edges: int, norm: float, masked: int
) -> dict[str, Any]:
    train, sas = config.train, config.sas
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
