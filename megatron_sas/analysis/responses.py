"""How results depend on λ, and on how long the suppression lasts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_sas.analysis.comparisons import Condition, runs_of, whole_runs
from megatron_sas.analysis.statistics import Estimate, estimate
from megatron_sas.analysis.trajectories import METRICS, TABLE_METRICS, Metric, Run


@dataclass(frozen=True)
class ResponsePoint:
    """A condition at its λ (or stage length) `x`: per run final values, and their mean and standard error."""

    x: float
    condition: Condition
    final: dict[str, Estimate]  # of runs that reach the end (`whole_runs`), as all the rest
    values: dict[str, list[float]]
    area: dict[str, Estimate]


@dataclass(frozen=True)
class StageResponse:
    """Conditions that suppress with `weight` until `x` and then let go, and the one that never does, if there is."""

    weight: float
    points: list[ResponsePoint]
    never_released: Condition | None


def weight_response(found: Sequence[Condition]) -> tuple[list[ResponsePoint], list[ResponsePoint]]:
    """Conditions of constant λ by rising λ: those of syntax, the base among them, and controls."""
    constant = [c for c in found if c.runs[0].constant_weight is not None and c.role != "other"]
    whole = _whole(found)
    points = [_point(c.runs[0].constant_weight, c, whole) for c in constant]
    points.sort(key=lambda point: point.x)
    return [p for p in points if p.condition.role != "control"], [p for p in points if p.condition.role == "control"]


def stage_responses(found: Sequence[Condition]) -> list[StageResponse]:
    """Effect of stage length, one per λ that some condition releases."""
    released: dict[float, list[ResponsePoint]] = {}
    whole = _whole(found)
    for condition in found:
        run = condition.runs[0]
        if condition.role == "release" and run.release_step is not None:
            weight = run.released[0] if run.released else _first_weight(run)
            released.setdefault(weight, []).append(_point(run.release_step, condition, whole))
    never = {c.runs[0].constant_weight: c for c in found if c.role == "suppress"}
    return [
        StageResponse(weight, sorted(points, key=lambda point: point.x), never.get(weight))
        for weight, points in sorted(released.items())
    ]


def mean_over_training(run: Run, metric: Metric) -> float | None:
    """Area under a curve over its length in steps: the mean of the piecewise linear curve."""
    curve = run.metric(metric)
    if len(curve) < 2:
        return None
    return float(np.trapezoid(curve.values, curve.steps) / (curve.steps[-1] - curve.steps[0]))


def _first_weight(run: Run) -> float:
    return min(run.schedule, key=lambda stage: stage.start).value if run.schedule else 0.0


def _whole(found: Sequence[Condition]) -> dict[str, set[str]]:
    return {metric.name: whole_runs(runs_of(found), metric) for metric in TABLE_METRICS}


def _point(x: float, condition: Condition, whole: dict[str, set[str]]) -> ResponsePoint:
    values, area = {}, {}
    for metric in TABLE_METRICS:
        runs = [run for run in condition.runs if str(run.path) in whole[metric.name]]
        finals = [value for run in runs if (value := run.final(metric)) is not None]
        if finals:
            values[metric.name] = finals
        areas = []
        if metric in METRICS:
            areas = [value for run in runs if (value := mean_over_training(run, metric)) is not None]
        if areas:
            area[metric.name] = estimate(areas)
    final = {name: estimate(finals) for name, finals in values.items()}
    return ResponsePoint(x, condition, final, values, area)
