"""What is measured of attention, layer by layer as a forward pass produces it: entropy, attention to [CLS], SAS.

Several observers share one pass (`share_pass`), so only one layer's maps exist at a time. B sequences, S tokens, L
layers, H heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from megatron_sas.core.distributed import all_reduce_sum_
from megatron_sas.evaluation.base import Metric
from megatron_sas.evaluation.batching import Encoder, TokenBatch
from megatron_sas.kernels import attention_statistics, map_statistics
from megatron_sas.kernels.reference import Window
from megatron_sas.model.base import ModelOutput

COLLAPSED = 0.25
"""A head with less than this share of the largest entropy it can have gives nearly all its attention to few tokens."""

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


class Observer:
    """Adds up over batches what it `reads` of attention.

    "maps": every layer's map, float32 (B, H, S, S) before dropout, which is formed only if somebody reads it;
    "queries": every layer's queries and keys, each (B, H, S, D), and its window, or its map where a model shows no
    queries; "edges": the probabilities along `dep_heads`, which the model returns.
    """

    reads: ClassVar[Literal["maps", "queries", "edges"]] = "maps"

    def observe(self, batch: TokenBatch, layer: int, *seen: Any) -> None:
        """Look at one layer; layers come in order."""

    def end_batch(self, batch: TokenBatch, output: ModelOutput) -> None:
        """All layers of a batch have been observed."""


def share_pass(model: Encoder, batch: TokenBatch, observers: Sequence[Observer] = (), **inputs: Any) -> ModelOutput:
    """One forward pass of a batch, with `inputs`, that feeds all observers; returns the model's output."""
    of_queries = [observer for observer in observers if observer.reads == "queries" and model.shows_queries]
    of_maps = [observer for observer in observers if observer.reads != "edges" and observer not in of_queries]

    def observe_map(layer: int, probs: Tensor) -> None:
        for observer in of_maps:
            observer.observe(batch, layer, probs)

    def observe_queries(layer: int, q: Tensor, k: Tensor, window: Window) -> None:
        for observer in of_queries:
            observer.observe(batch, layer, q, k, window)

    if of_maps:
        inputs["attention_observer"] = observe_map
    if of_queries:
        inputs["query_key_observer"] = observe_queries
    if any(observer.reads == "edges" for observer in observers):
        inputs["heads"] = batch.dep_heads
    output = model(batch.input_ids, seqlens=batch.seqlens, **inputs)
    for observer in observers:
        observer.end_batch(batch, output)
    return output


class AttentionStatistics(Observer):
    """Entropy of every head's attention, in nats, and its attention to [CLS] and to [SEP].

    Averaged over all tokens that are no padding; [CLS] and [SEP] count like other tokens, as queries and as keys. From
    queries and keys, without maps (`kernels/entropy.py`), where the model shows them.
    """

    reads = "queries"

    def __init__(self, cls_id: int, sep_id: int) -> None:
        self._special_ids = (cls_id, sep_id)
        self._sums: dict[int, Tensor | float] = {}  # float64 (3, H) by layer: entropy, to [CLS], to [SEP]
        self._tokens: Tensor | float = 0.0  # float64 (2,): tokens, and the sum of entropies of attention to all alike
        self._windows: dict[int, Window] = {}  # by layer
        self._largest: dict[Window, Tensor | float] = {}  # float64 (): the sum of the largest entropies in a window

    def observe(self, batch: TokenBatch, layer: int, *seen: Any) -> None:
        """See `Observer`."""
        groups = [batch.input_ids == special for special in self._special_ids]
        if len(seen) == 1:
            entropy, (to_cls, to_sep) = map_statistics(*seen, groups)
        else:
            q, k, window = seen
            self._windows[layer] = window
            entropy, (to_cls, to_sep) = attention_statistics(q, k, seqlens=batch.seqlens, groups=groups, window=window)
        total = torch.stack([entropy, to_cls, to_sep]).double()  # (3, B, H, S)
        if batch.seqlens is not None:
            valid = torch.arange(total.shape[3], device=total.device) < batch.seqlens[:, None]
            total = total.masked_fill(~valid[:, None], 0.0)
        self._sums[layer] = self._sums.get(layer, 0.0) + torch.einsum("cbhs,b->ch", total, _rows_that_count(batch))

    def end_batch(self, batch: TokenBatch, output: ModelOutput) -> None:
        """See `Observer`."""
        rows, seq = batch.input_ids.shape
        lengths = torch.full((rows,), seq) if batch.seqlens is None else batch.seqlens
        lengths = lengths.to(batch.input_ids.device, torch.float64) * _rows_that_count(batch)
        self._tokens = self._tokens + torch.stack([lengths.sum(), torch.xlogy(lengths, lengths).sum()])
        for window in set(self._windows.values()) - {None}:
            seen = seen_keys(seq, lengths, window)  # (B, S)
            self._largest[window] = self._largest.get(window, 0.0) + seen.clamp(min=1).log().sum()

    def result(self, threshold: float = COLLAPSED) -> dict[str, Any]:
        """`entropy`, `to_cls` and `to_sep`, each with the `mean` over heads and `per_head` [L][H]; and two numbers.

        `uniform_entropy` is that of attention to all tokens alike, and `collapsed_heads` the share of heads with less
        than `threshold` of it, or, in a layer with local attention, of the largest entropy in its window. A collective:
        every rank gets the result of all ranks.
        """
        layers = sorted(self._sums)
        sums = torch.stack([self._sums[layer] for layer in layers], dim=1)  # (3, L, H)
        local = [window for window in dict.fromkeys(self._windows.get(layer) for layer in layers) if window is not None]
        largest = [self._largest[window].reshape(1) for window in local]
        reduced = all_reduce_sum_(torch.cat([sums.flatten(), *largest, self._tokens]))
        tokens, uniform = reduced[-2:].tolist()
        means = (reduced[: sums.numel()] / tokens).view_as(sums).cpu()
        limits = {None: uniform, **dict(zip(local, reduced[sums.numel() : -2].tolist(), strict=True))}
        limit = torch.tensor([limits[self._windows.get(layer)] for layer in layers], dtype=torch.float64)
        collapsed = means[0] < (threshold * limit / tokens)[:, None]
        return {
            **{
                name: {"mean": float(per_head.mean()), "per_head": per_head.tolist()}
                for name, per_head in zip(("entropy", "to_cls", "to_sep"), means, strict=True)
            },
            "uniform_entropy": uniform / tokens,
            "collapsed_heads": float(collapsed.double().mean()),
        }

    def point(self) -> dict[str, Any]:
        """`result` under the names of a point.json."""
        return {f"attention_{name}": value for name, value in self.result().items()}


def seen_keys(seq: int, lengths: Tensor, window: tuple[int, int]) -> Tensor:
    """How many keys each query of sequences of `lengths` `(B,)` sees in a window: float64 `(B, S)`, 0 for padding."""
    rows, limit = torch.arange(seq, device=lengths.device), lengths[:, None]
    before, after = window
    seen = torch.minimum(rows + after, limit - 1) - (rows - before).clamp(min=0) + 1
    return torch.where(rows < limit, seen, 0.0).double()


def _rows_that_count(batch: TokenBatch) -> Tensor:
    """float64 `(B,)`: 1 for rows that count, 0 for others."""
    counts = torch.as_tensor(batch.counts, dtype=torch.float64, device=batch.input_ids.device)
    return counts.expand(len(batch.input_ids))


class _SasObserver(Observer):
    """Attention along edges as the regularizer measures it, per edge: maximum and mean over layers and heads."""

    def __init__(self) -> None:
        self._sums: Tensor | float = 0.0  # float64 (4,), in the order of `result`
        self._edges = 0

    def _add(self, best: Tensor, mean: Tensor, edges: int) -> None:
        """Add a batch: sums over its edges of the maxima and of the means, float64 (2,) each, to head first."""
        self._sums = self._sums + torch.cat([best, mean])
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


class SasOfMaps(_SasObserver):
    """SAS read off the maps, where these are formed anyway."""

    def __init__(self) -> None:
        super().__init__()
        self._layers: list[Tensor] = []  # float32 (2, edges, H) of the layers so far

    def observe(self, batch: TokenBatch, layer: int, *seen: Any) -> None:
        """See `Observer`."""
        (probs,) = seen
        row, dependent = torch.nonzero(batch.dep_heads >= 0, as_tuple=True)
        head = batch.dep_heads[row, dependent]
        # Indexing with a slice between puts the edges first: (edges, H).
        self._layers.append(torch.stack([probs[row, :, dependent, head], probs[row, :, head, dependent]]))

    def end_batch(self, batch: TokenBatch, output: ModelOutput) -> None:
        """See `Observer`."""
        best = torch.stack([along.amax(dim=-1) for along in self._layers]).amax(dim=0)  # (2, edges)
        total = sum(along.sum(dim=(1, 2), dtype=torch.float64) for along in self._layers)
        if batch.counts:
            num_heads = sum(along.shape[-1] for along in self._layers)
            self._add(best.sum(dim=1, dtype=torch.float64), total / num_heads, best.shape[1])
        self._layers.clear()


class SasOfEdges(_SasObserver):
    """SAS from the probabilities along edges that the model returns, (B, H, S) per layer, 0 without an edge."""

    reads = "edges"

    def end_batch(self, batch: TokenBatch, output: ModelOutput) -> None:
        """See `Observer`."""
        if not batch.counts:
            return
        along = torch.stack([torch.cat(output.to_head, dim=1), torch.cat(output.to_dependent, dim=1)])  # (2, B, L·H, S)
        best = along.amax(dim=2).sum(dim=(1, 2), dtype=torch.float64)
        mean = along.sum(dim=(1, 2, 3), dtype=torch.float64) / along.shape[2]
        self._add(best, mean, int((batch.dep_heads >= 0).sum()))
