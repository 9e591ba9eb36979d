"""What is measured on attention maps, layer by layer as a forward pass produces them: entropy, and SAS.

Several observers share one pass (`share_pass`), so only one layer's maps exist at a time. B sequences, S tokens, L
layers, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class TokenBatch(Protocol):
    """What observers need to know about a batch besides its maps."""

    seqlens: Tensor | None  # int64 (B,), valid lengths; None: all of S
    heads: Tensor  # int64 (B, S), dependency heads, -1 = none
    counts: bool  # false for a batch that is only run because other ranks run one


class MapObserver(Protocol):
    """Something that adds up what it measures over batches."""

    def observe(self, batch: Any, layer: int, probs: Tensor) -> None:
        """Look at one layer's maps, float32 (B, H, S, S) before dropout; layers come in order."""

    def end_batch(self, batch: Any) -> None:
        """All layers of a batch have been observed."""


def share_pass(model: torch.nn.Module, batch: Any, observers: Sequence[MapObserver], **inputs: Any) -> Any:
    """One forward pass of `batch.input_ids` and `inputs` that feeds all observers; returns the model's output."""

    def observe(layer: int, probs: Tensor) -> None:
        for observer in observers:
            observer.observe(batch, layer, probs)

    output = model(batch.input_ids, seqlens=batch.seqlens, attention_observer=observe, **inputs)
    for observer in observers:
        observer.end_batch(batch)
    return output


class EntropyObserver:
    """Entropy of every head's attention, in nats: -Σ_j α_ij log α_ij, averaged over all tokens i that are no padding.

    [CLS] and [SEP] count like other tokens, as queries and as keys.
    """

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}  # float64 (H,) by layer
        self._tokens = 0

    def observe(self, batch: TokenBatch, layer: int, probs: Tensor) -> None:
        """See `MapObserver`. Keys that are padding have probability 0 and add nothing."""
        if not batch.counts:
            return
        of_query = torch.special.entr(probs).sum(dim=-1, dtype=torch.float64)  # (B, H, S)
        if batch.seqlens is not None:
            valid = torch.arange(probs.shape[-1], device=probs.device) < batch.seqlens[:, None]
            of_query = of_query.masked_fill(~valid[:, None], 0.0)
        total = of_query.sum(dim=(0, 2))
        self._sums[layer] = self._sums[layer] + total if layer in self._sums else total

    def end_batch(self, batch: TokenBatch) -> None:
        """See `MapObserver`."""
        if batch.counts:
            rows, seq = batch.heads.shape
            self._tokens += rows * seq if batch.seqlens is None else int(batch.seqlens.sum())

    def result(self) -> dict[str, Any]:
        """`mean` over heads and `per_head` [L][H], in nats."""
        per_head = torch.stack([self._sums[layer] for layer in sorted(self._sums)]) / self._tokens
        return {"mean": float(per_head.mean()), "per_head": per_head.tolist()}


class SasObserver:
    """Attention along edges as the regularizer measures it, per edge: maximum and mean over layers and heads."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # float64 (4,), in the order of `result`
        self._edges = 0
        self._best: Tensor | None = None  # (2, edges of the batch): maximum over the layers so far
        self._total: Tensor | None = None  # (2,), float64: sum over edges, heads and layers so far
        self._num_heads = 0  # of the layers so far

    def observe(self, batch: TokenBatch, layer: int, probs: Tensor) -> None:
        """See `MapObserver`."""
        if not batch.counts:
            return
        row, dependent = torch.nonzero(batch.heads >= 0, as_tuple=True)
        head = batch.heads[row, dependent]
        # Indexing with a slice between puts the edges first: (edges, H).
        along = torch.stack([probs[row, :, dependent, head], probs[row, :, head, dependent]])  # (2, edges, H)
        best, total = along.amax(dim=-1), along.sum(dim=(1, 2), dtype=torch.float64)
        first = layer == 0
        self._best = best if first else torch.maximum(self._best, best)
        self._total = total if first else self._total + total
        self._num_heads = along.shape[-1] + (0 if first else self._num_heads)

    def end_batch(self, batch: TokenBatch) -> None:
        """See `MapObserver`."""
        if not batch.counts:
            return
        self._add(self._best.sum(dim=1, dtype=torch.float64), self._total / self._num_heads, self._best.shape[1])

    def add_output(self, heads: Tensor, to_head: Sequence[Tensor], to_dependent: Sequence[Tensor]) -> None:
        """Add a batch from what the model returns for `heads` (B, S), (B, H, S) per layer, 0 without an edge."""
        along = torch.stack([torch.cat(tuple(to_head), dim=1), torch.cat(tuple(to_dependent), dim=1)])  # (2, B, L·H, S)
        best = along.amax(dim=2).sum(dim=(1, 2), dtype=torch.float64)
        mean = along.sum(dim=(1, 2, 3), dtype=torch.float64) / along.shape[2]
        self._add(best, mean, int((heads >= 0).sum()))

    def _add(self, best: Tensor, mean: Tensor, edges: int) -> None:
        """Add a batch: sums over its edges of the maxima and of the means, float64 (2,) each, to head first."""
        sums = torch.cat([best, mean])
        self._sums = sums if self._sums is None else self._sums + sums
        self._edges += edges

    def result(self) -> dict[str, Any] | None:
        """Means over edges, and their number; None without edges.

        `to_head` and `to_dependent` of the maximum over (layer, head), `uniform_to_head` and `uniform_to_dependent` of
        the mean over all (layer, head).
        """
        if self._edges == 0:
            return None
        names = ("to_head", "to_dependent", "uniform_to_head", "uniform_to_dependent")
        means = (self._sums / self._edges).tolist()
        return {**dict(zip(names, means, strict=True)), "num_edges": self._edges}
