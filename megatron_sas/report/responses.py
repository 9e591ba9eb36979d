"""How results depend on λ, and on how long the suppression lasts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_sas.evaluation.base import Metric
from megatron_sas.report.comparisons import Condition, final_values
from megatron_sas.report.statistics import Estimate, estimate
from megatron_sas.report.trajectories import METRICS, Run


@dataclass(frozen=True)
class ResponsePoint:
    """A condition at its λ (or stage length) `x`. All values, by metric name, are of runs that reach the end."""

    x: float
    condition: Condition

    @cached_property
    def values(self) -> dict[str, list[float]]:
        """The final value of each run."""
        return final_values(self.condition.whole)

    @cached_property
    def final(self) -> dict[str, Estimate]:
        """Mean and standard error of the final values."""
        return {name: estimate(values) for name, values in self.values.items()}

    @cached_property
    def area(self) -> dict[str, Estimate]:
        """The same of the means over training."""
        areas = {m.name: [mean_over_training(run, m) for run in self.condition.whole[m.name]] for m in METRICS}
        known = {name: [area for area in values if area is not None] for name, values in areas.items()}
        return {name: estimate(values) for name, values in known.items() if values}


@dataclass(frozen=True)
class StageResponse:
    """Conditions that suppress with `weight` until `x` and then let go.

    `levels`, to compare them with, are final values by name: of the base, and of what never lets go, if there are such.
    """

    weight: float
    points: list[ResponsePoint]
    levels: dict[str, dict[str, Estimate]]


def weight_response(conditions: Sequence[Condition]) -> tuple[list[ResponsePoint], list[ResponsePoint]]:
    """Conditions of constant λ by rising λ: those of syntax, the base among them, and controls."""
    constant = [c for c in conditions if c.runs[0].constant_weight is not None and c.role != "other"]
    points = sorted((ResponsePoint(c.runs[0].constant_weight, c) for c in constant), key=lambda point: point.x)
    return [p for p in points if p.condition.role != "control"], [p for p in points if p.condition.role == "control"]


def stage_responses(conditions: Sequence[Condition]) -> list[StageResponse]:
    """Effect of stage length, one per λ that some condition releases; all values are of whole runs."""
    released: dict[float, list[ResponsePoint]] = {}
    for condition in conditions:
        run = condition.runs[0]
        if condition.role == "release" and run.release_step is not None:
            weight = run.plateau[0] if run.plateau else run.schedule(min(run.schedule.knots(), default=0))
            released.setdefault(weight, []).append(ResponsePoint(run.release_step, condition))
    responses = []
    for weight, points in sorted(released.items()):
        levels = [conditions[0].base] if conditions[0].base else []
        levels += [c for c in conditions if c.role == "suppress" and c.runs[0].constant_weight == weight]
        finals = {c.label: ResponsePoint(weight, c).final for c in levels}
        responses.append(StageResponse(weight, sorted(points, key=lambda point: point.x), finals))
    return responses


def mean_over_training(run: Run, metric: Metric) -> float | None:
    """Area under a curve over its length in steps: the mean of the piecewise linear curve."""
    curve = run.metric(metric)
    if len(curve) < 2:
        return None
    return float(np.trapezoid(curve.values, curve.steps) / (curve.steps[-1] - curve.steps[0]))
