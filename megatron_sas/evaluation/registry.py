"""The evaluations that there are, and their metrics."""

from __future__ import annotations

from collections.abc import Iterator

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
