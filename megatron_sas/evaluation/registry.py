"""The evaluations that there are, and what follows from that: the section of the configuration, and their metrics."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from megatron_sas.core.settings import When
from megatron_sas.evaluation.base import TEXT, Evaluation, Metric
from megatron_sas.evaluation.complexity import WEIGHT_NORM, ComplexityEvaluation
from megatron_sas.evaluation.minimal_pairs import BlimpEvaluation
from megatron_sas.evaluation.observers import OBSERVED
from megatron_sas.evaluation.uas import UasEvaluation
from megatron_sas.evaluation.validation import ValidationEvaluation

EVALUATIONS: dict[str, type[Evaluation]] = {
    "validation": ValidationEvaluation,
    "complexity": ComplexityEvaluation,
    "uas": UasEvaluation,
    "blimp": BlimpEvaluation,
}
"""In the order in which a run makes and records them."""


def own_input_first() -> list[type[Evaluation]]:
    """The evaluations with an input of their own, then those on text: the order of settings and columns."""
    return sorted(EVALUATIONS.values(), key=lambda evaluation: evaluation.input == TEXT)


class EvaluationSection(*(evaluation.settings for evaluation in reversed(own_input_first())), When):
    """When and on what the model is evaluated while it trains."""

    batch_tokens: int = Field(16_384, description="tokens per evaluation forward", ge=1)
    max_time_share: float = Field(0.25, description="evaluations are thinned out beyond this share of time", gt=0, lt=1)


def live_metrics() -> Iterator[Metric]:
    """All metrics of records, in the order of `EVALUATIONS`; what belongs to none of them last."""
    for evaluation in EVALUATIONS.values():
        yield from evaluation.metrics
    yield WEIGHT_NORM


def snapshot_metrics() -> Iterator[Metric]:
    """All metrics that a measured snapshot may have, in the order of columns."""
    for evaluation in own_input_first():
        yield from evaluation.metrics
    yield from (WEIGHT_NORM, *OBSERVED)
