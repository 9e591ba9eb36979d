"""How results depend on λ, and on how long the suppression lasts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_sas.evaluation.base import Metric
from megatron_sas.report.comparisons import Condition, base_name, runs_of, whole_runs
from megatron_sas.report.statistics import Estimate, estimate
from megatron_sas.report.trajectories import METRICS, TABLE_METRICS, Run


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
    """Conditions that suppress with `weight` until `x` and then let go.

    `levels`, to compare them with, are final values by name: of the base, and of what never lets go, if there are such.
    """

    weight: float
    points: list[ResponsePoint]
    levels: dict[str, dict[str, Estimate]]


def weight_response(conditions: Sequence[Condition]) -> tuple[list[ResponsePoint], list[ResponsePoint]]:
    """Conditions of constant λ by rising λ: those of syntax, the base among them, and controls."""
    constant = [c for c in conditions if c.runs[0].constant_weight is not None and c.role != "other"]
    whole = _whole(conditions)
    points = [_point(c.runs[0].constant_weight, c, whole) for c in constant]
    points.sort(key=lambda point: point.x)
    return [p for p in points if p.condition.role != "control"], [p for p in points if p.condition.role == "control"]


def stage_responses(conditions: Sequence[Condition]) -> list[StageResponse]:
    """Effect of stage length, one per λ that some condition releases; all values are of whole runs."""
    released: dict[float, list[ResponsePoint]] = {}
    whole = _whole(conditions)
    for condition in conditions:
        run = condition.runs[0]
        if condition.role == "release" and run.release_step is not None:
            weight = run.released[0] if run.released else _first_weight(run)
            released.setdefault(weight, []).append(_point(run.release_step, condition, whole))
    base = [run for run in runs_of(conditions) if run.is_base]
    responses = []
    for weight, points in sorted(released.items()):
        levels = {base_name(base): base} if base else {}
        levels |= {c.label: c.runs for c in conditions if c.role == "suppress" and c.runs[0].constant_weight == weight}
        finals = {name: _finals(runs, whole)[0] for name, runs in levels.items()}
        responses.append(StageResponse(weight, sorted(points, key=lambda point: point.x), finals))
    return responses


def mean_over_training(run: Run, metric: Metric) -> float | None:
    """Area under a curve over its length in steps: the mean of the piecewise linear curve."""
    curve = run.metric(metric)
    if len(curve) < 2:
        return None
    return float(np.trapezoid(curve.values, curve.steps) / (curve.steps[-1] - curve.steps[0]))


def _first_weight(run: Run) -> float:
    return run.schedule(min(run.schedule.knots(), default=0))


def _whole(conditions: Sequence[Condition]) -> dict[str, set[str]]:
    return {metric.name: whole_runs(runs_of(conditions), metric) for metric in TABLE_METRICS}


def _point(x: float, condition: Condition, whole: dict[str, set[str]]) -> ResponsePoint:
    final, values = _finals(condition.runs, whole)
    area = {}
    for metric in METRICS:
        runs = [run for run in condition.runs if str(run.path) in whole[metric.name]]
        areas = [value for run in runs if (value := mean_over_training(run, metric)) is not None]
        if areas:
            area[metric.name] = estimate(areas)
    return ResponsePoint(x, condition, final, values, area)


def _finals(runs: Sequence[Run], whole: dict[str, set[str]]) -> tuple[dict[str, Estimate], dict[str, list[float]]]:
    """Final values of the whole runs by metric name: their mean and error, and each."""
    values = {}
    for metric in TABLE_METRICS:
        finals = [run.final(metric) for run in runs if str(run.path) in whole[metric.name]]
        if finals:
            values[metric.name] = finals
    return {name: estimate(finals) for name, finals in values.items()}, values
