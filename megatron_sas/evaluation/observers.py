"""What is measured of attention, layer by layer as a forward pass produces it: entropy, attention to [CLS], SAS.

Several observers share one pass (`share_pass`), so only one layer's maps exist at a time. B sequences, S tokens, L
layers, H heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_sas.core.distributed import all_reduce_sum_
from megatron_sas.evaluation.base import Metric
from megatron_sas.kernels import attention_statistics
from megatron_sas.kernels.reference import Window

COLLAPSED = 0.25
"""A head with less than this share of the largest possible entropy gives almost all of its attention to few tokens."""

OBSERVED = (
    Metric("attention_entropy", axis="attention\nentropy (nats)", point=("attention_entropy", "mean")),
    Metric("attention_to_cls", point=("attention_to_cls", "mean")),
    Metric("attention_to_sep", point=("attention_to_sep", "mean")),
    Metric("sas_to_head", axis="α to head,\nbest head", point=("sas", "to_head")),
    Metric("sas_to_dependent", point=("sas", "to_dependent")),
    Metric("sas_uniform_to_head", point=("sas", "uniform_to_head")),
    Metric("sas_uniform_to_dependent", point=("sas", "uniform_to_dependent")),
    Metric("text_sas_to_head", point=("text_sas", "to_head")),
    Metric("text_sas_to_dependent", point=("text_sas", "to_dependent")),
)
"""What observers give of a snapshot, on whatever input is there."""


class TokenBatch(Protocol):
    """What observers need to know about a batch besides its maps."""

    input_ids: Tensor  # int64 (B, S)
    seqlens: Tensor | None  # int64 (B,), valid lengths; None: all of S
    heads: Tensor  # int64 (B, S), dependency heads, -1 = none
    counts: bool | Tensor  # false for a batch, or bool (B,) for rows, that are only run because other ranks run one


class MapObserver(Protocol):
    """Something that adds up what it measures over batches."""

    def observe(self, batch: Any, layer: int, probs: Tensor) -> None:
        """Look at one layer's maps, float32 (B, H, S, S) before dropout; layers come in order."""

    def end_batch(self, batch: Any) -> None:
        """All layers of a batch have been observed."""


def share_pass(
    model: torch.nn.Module,
    batch: Any,
    observers: Sequence[MapObserver] = (),
    statistics: AttentionStatistics | None = None,
    **inputs: Any,
) -> Any:
    """One forward pass of `batch.input_ids` and `inputs` that feeds all observers; returns the model's output.

    Maps are formed only for `observers`.
    """

    def observe(layer: int, probs: Tensor) -> None:
        for observer in observers:
            observer.observe(batch, layer, probs)

    if observers:
        inputs["attention_observer"] = observe
    if statistics is not None:
        inputs["query_key_observer"] = partial(statistics.observe, batch)
    output = model(batch.input_ids, seqlens=batch.seqlens, **inputs)
    for observer in (*observers, *([] if statistics is None else [statistics])):
        observer.end_batch(batch)
    return output


class AttentionStatistics:
    """Entropy of every head's attention, in nats, and its attention to [CLS] and to [SEP].

    Averaged over all tokens that are no padding; [CLS] and [SEP] count like other tokens, as queries and as keys. From
    queries and keys, without maps (`kernels/entropy.py`).
    """

    def __init__(self, cls_id: int, sep_id: int) -> None:
        self._special_ids = (cls_id, sep_id)
        self._sums: dict[int, Tensor] = {}  # float64 (3, H) by layer: entropy, to [CLS], to [SEP]
        self._tokens: Tensor | None = None  # float64 (2,): tokens, and the sum of their largest possible entropies

    def observe(self, batch: TokenBatch, layer: int, q: Tensor, k: Tensor, window: Window) -> None:
        """Add one layer's queries and keys `(B, H, S, D)`; `window` is that of its attention."""
        groups = [batch.input_ids == special for special in self._special_ids]
        entropy, (to_cls, to_sep) = attention_statistics(q, k, seqlens=batch.seqlens, groups=groups, window=window)
        total = torch.stack([entropy, to_cls, to_sep]).double()  # (3, B, H, S)
        if batch.seqlens is not None:
            valid = torch.arange(q.shape[2], device=q.device) < batch.seqlens[:, None]
            total = total.masked_fill(~valid[:, None], 0.0)
        total = torch.einsum("cbhs,b->ch", total, _rows_that_count(batch))
        self._sums[layer] = self._sums[layer] + total if layer in self._sums else total

    def end_batch(self, batch: TokenBatch) -> None:
        """All layers of a batch have been observed."""
        rows, seq = batch.input_ids.shape
        lengths = torch.full((rows,), seq) if batch.seqlens is None else batch.seqlens
        lengths = lengths.to(batch.input_ids.device, torch.float64) * _rows_that_count(batch)
        tokens = torch.stack([lengths.sum(), torch.xlogy(lengths, lengths).sum()])
        self._tokens = tokens if self._tokens is None else self._tokens + tokens

    def result(self, threshold: float = COLLAPSED) -> dict[str, Any]:
        """`entropy`, `to_cls` and `to_sep`, each with the `mean` over heads and `per_head` [L][H]; and two numbers.

        `uniform_entropy` is that of attention to all tokens alike, the largest possible, and `collapsed_heads` the
        share of heads with less than `threshold` of it. A collective: every rank gets the result of all ranks.
        """
        sums = torch.stack([self._sums[layer] for layer in sorted(self._sums)], dim=1)  # (3, L, H)
        reduced = all_reduce_sum_(torch.cat([sums.flatten(), self._tokens]))
        tokens, uniform = reduced[-2:].tolist()
        means = (reduced[:-2] / tokens).view_as(sums).cpu()
        result: dict[str, Any] = {
            name: {"mean": float(per_head.mean()), "per_head": per_head.tolist()}
            for name, per_head in zip(("entropy", "to_cls", "to_sep"), means, strict=True)
        }
        collapsed = means[0] < threshold * uniform / tokens
        return {
            **result,
            "uniform_entropy": uniform / tokens,
            "collapsed_heads": float(collapsed.double().mean()),
        }

    def point(self) -> dict[str, Any]:
        """`result` under the names of a point.json."""
        return {f"attention_{name}": value for name, value in self.result().items()}


def _rows_that_count(batch: TokenBatch) -> Tensor:
    """float64 `(B,)`: 1 for rows that count, 0 for others."""
    counts = torch.as_tensor(batch.counts, dtype=torch.float64, device=batch.input_ids.device)
    return counts.expand(len(batch.input_ids))


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
