"""How complex a model is: the intrinsic dimension of its [CLS] vectors, and the norm of its weights.

TwoNN (Facco et al. 2017): with r₁ and r₂ a point's distances to its nearest and second nearest neighbour, μ = r₂/r₁
follows F(μ) = 1 - μ^-d wherever the density is constant up to the second neighbour; d is the slope of -log(1 - F)
against log μ through the origin.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from megatron_sas.core import distributed
from megatron_sas.core.settings import Section
from megatron_sas.data.packed import PackedData
from megatron_sas.evaluation.base import Evaluation, Metric, Resources
from megatron_sas.evaluation.batching import Encoder, evaluating
from megatron_sas.evaluation.observers import AttentionStatistics, Observer, SasOfEdges, share_pass
from megatron_sas.evaluation.text import TextBatch, packed_text, unknown_in

DISCARDED = 0.1  # share of the points, those with the largest μ, left out of the fit (Facco et al.)
MIN_POINTS = 10
ENOUGH_POINTS = 100  # below this the standard error is a tenth of the value or more
RESAMPLES = 200

TWONN = Metric(
    "twonn",
    "intrinsic dimension of the [CLS] vectors (TwoNN)",
    axis="intrinsic\ndimension",
    point=("intrinsic_dimension", "twonn"),
)
WEIGHT_NORM = Metric("weight_norm", "norm of the weights", axis="weight norm")


def intrinsic_dimension(vectors: Tensor, texts: np.ndarray | None = None) -> dict[str, Any]:
    """TwoNN of `vectors` (N, C), computed in float64 on their device.

    `texts` (N, S) are the tokens that they are of, if known. Equal texts then count once even where their vectors
    differ in the last digits, as they may in batches of different sizes: such near duplicates are each other's nearest
    neighbour and spoil the estimate.

    Keys: `twonn` (None for fewer than `MIN_POINTS` distinct points, points that are not finite, or neighbours that are
    all equally far), `standard_error` (spread over bootstrap samples of the μ, which takes them for independent),
    `num_points` (distinct points), `duplicates` (points equal to another one, which are left out) and `discarded`
    (points left out of the fit).
    """
    if texts is not None:
        _, first, which = np.unique(texts, axis=0, return_index=True, return_inverse=True)
        vectors = vectors[torch.from_numpy(first[which.reshape(-1)]).to(vectors.device)]
    points = torch.unique(vectors.double(), dim=0)  # sorted, so the order in which vectors came does not matter
    count = len(points)
    result = {"num_points": count, "duplicates": len(vectors) - count, "discarded": count - _num_fitted(count)}
    twonn = error = None
    if count >= MIN_POINTS and bool(torch.isfinite(points).all()):
        nearest = two_nearest(points)
        log_mu = np.sort(torch.log(nearest[:, 1] / nearest[:, 0]).cpu().numpy())
        if log_mu[_num_fitted(count) - 1] > 0:
            twonn = _slope(log_mu)
            draws = np.random.default_rng(0).integers(0, count, (RESAMPLES, count), dtype=np.int32)
            error = float(np.std([_slope(np.sort(log_mu[draw])) for draw in draws], ddof=1))
    return {"twonn": twonn, "standard_error": error, **result}


def two_nearest(points: Tensor) -> Tensor:
    """Distances of each of N distinct points (N, C) to the two nearest others, ascending: float64 (N, 2).

    Neighbours are found from |b|² - 2ab; their distances are computed from the differences, which do not cancel.
    """
    points = points.double()
    points = points - points.mean(dim=0)
    squares, nearest = points.square().sum(dim=1), []
    for rows in torch.arange(len(points), device=points.device).split(max(1, 2**22 // len(points))):
        distances = torch.addmm(squares, points[rows], points.T, alpha=-2.0)  # (rows, N), less |a|²
        distances[torch.arange(len(rows), device=points.device), rows] = torch.inf
        nearest.append(distances.topk(2, largest=False).indices)
    neighbours = torch.cat(nearest)  # (N, 2)
    distances = torch.stack([(points - points[number]).norm(dim=1) for number in neighbours.T], dim=1)
    return distances.sort(dim=1).values


def weight_norm(model: torch.nn.Module) -> float:
    """Euclidean norm of all weights: what the trainer records under this name."""
    return float(sum(parameter.detach().double().square().sum() for parameter in model.parameters()).sqrt())


def cls_vectors(
    model: Encoder, batches: Iterable[TextBatch], num_texts: int, observers: Sequence[Observer] = ()
) -> Tensor:
    """Last hidden layer at [CLS] of every text: float32 (`num_texts`, C) on the model's device.

    Under a process group `batches` are this rank's, equally many on every rank, and every rank returns all vectors.
    """
    result = None
    with evaluating(model) as device:
        for batch in batches:
            batch = batch.to(device)
            first = torch.arange(0, batch.input_ids.numel(), batch.input_ids.shape[1], device=device)
            hidden = share_pass(model, batch, observers, only_at=first).hidden  # (B, C)
            if result is None:
                result = torch.zeros(num_texts, hidden.shape[1], dtype=torch.float32, device=device)
            if batch.counts:
                result[batch.numbers] = hidden.float()
    return distributed.all_reduce_sum_(result)


def _num_fitted(count: int) -> int:
    return int(count * (1 - DISCARDED))


def _slope(log_mu: np.ndarray) -> float:
    """Least squares through the origin of -log(1 - i/N) against the i-th smallest log μ, without the largest."""
    count = len(log_mu)
    x = log_mu[: _num_fitted(count)]
    y = -np.log1p(-np.arange(1, len(x) + 1) / count)
    return float(x @ y / (x @ x))


class ComplexitySettings(Section):
    """Of the intrinsic dimension."""

    complexity_sequences: int | None = Field(
        None, description="sequences of data.validation for TwoNN intrinsic dimension; none: not measured", ge=10
    )


class ComplexityEvaluation(Evaluation):
    """TwoNN of the [CLS] vectors of unmasked text."""

    settings = ComplexitySettings
    metrics = (
        TWONN,
        Metric("twonn_standard_error", point=("intrinsic_dimension", "standard_error")),
        Metric("twonn_duplicates"),
    )

    @classmethod
    def shortages(cls, section: ComplexitySettings, text: PackedData) -> list[str]:
        """Fewer sequences than were asked for, or too few for an estimate."""
        there, wanted, phrases = text.num_sequences, section.complexity_sequences, []
        if there < wanted:
            phrases.append(f"{wanted} are wanted, but {text.prefix} has {there}")
        if (points := min(there, wanted)) < ENOUGH_POINTS:
            phrases.append(f"TwoNN of {points} points says little; give it {ENOUGH_POINTS} or more")
        return [f"complexity_sequences: {phrase}" for phrase in phrases]

    @classmethod
    def faults(cls, section: ComplexitySettings, has_text: bool) -> list[str]:
        """See `Evaluation`."""
        lacks_text = cls.wanted(section) and not has_text
        return ["complexity_sequences: needs data.validation, which is not given"] if lacks_text else []

    def __init__(self, section: Any, resources: Resources) -> None:
        super().__init__(section, resources)
        self.text = resources.text
        self.num_texts = min(section.complexity_sequences, self.text.num_sequences)

    def run(self, model: Encoder) -> dict[str, Any]:
        """See `Evaluation`."""
        result = self._dimension(model, [])
        values = (result["twonn"], result["standard_error"], result["duplicates"])
        return {metric.key: value for metric, value in zip(self.metrics, values, strict=True)}

    def measure(self, model: Encoder) -> tuple[dict[str, Any], None]:
        """Also SAS on the data's own edges, and attention's entropy if nothing else gives it, in the same pass."""
        sas, info = SasOfEdges(), self.text.tokenizer
        statistics = AttentionStatistics(info.cls_id, info.sep_id) if self.resources.text_gives_attention else None
        observers = [] if model.no_maps else [sas, *([] if statistics is None else [statistics])]
        values: dict[str, Any] = {
            "intrinsic_dimension": self._dimension(model, observers),
            "text_unknown": unknown_in(self.text, self.num_texts).record(),
        }
        if statistics is not None:
            values |= statistics.point()
        if (along := sas.result()) is not None:
            values["text_sas"] = along
        return values, None

    def _dimension(self, model: Encoder, observers: Sequence[Observer]) -> dict[str, Any]:
        batches = packed_text(self.text, num_sequences=self.num_texts, batch_tokens=self.section.batch_tokens)
        vectors = cls_vectors(model, batches, self.num_texts, observers)
        return intrinsic_dimension(vectors, self.text.tokens[: self.num_texts])
