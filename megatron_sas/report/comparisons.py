"""Final values per condition, and their differences: to the base, and of a regularized condition to its control."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_sas.evaluation.base import Metric
from megatron_sas.glue.tasks import GLUE
from megatron_sas.report.statistics import Difference, Estimate, difference, estimate, holm
from megatron_sas.report.trajectories import TABLE_METRICS, Run, group_by_condition

WHOLE = 0.95  # a run whose curve ends before this share of the longest does not enter comparisons


@dataclass(frozen=True)
class Condition:
    """Runs of one label with their final values by metric name; `difference` is to the base, empty for the base.

    `ending` has, by metric, the runs that final values are of: the whole ones (`whole_runs`), or, where there are none,
    all that have values, which are then compared with nothing.
    """

    label: str
    runs: list[Run]
    ending: dict[str, list[Run]]
    difference: dict[str, Comparison]

    @cached_property
    def final(self) -> dict[str, Estimate]:
        """Final values by metric name; absent where no run has one."""
        by_name = {metric.name: metric for metric in TABLE_METRICS}
        return {
            name: estimate([value for run in runs if (value := run.final(by_name[name])) is not None])
            for name, runs in self.ending.items()
            if runs
        }

    @property
    def is_base(self) -> bool:
        """Whether λ is 0 throughout."""
        return self.runs[0].is_base

    @property
    def role(self) -> str:
        """The role of its runs."""
        return self.runs[0].role


@dataclass(frozen=True)
class Comparison:
    """One condition minus another in one metric; `holm` is p corrected over the family that it was tested in."""

    left: str
    right: str
    metric: Metric
    value: Difference
    holm: float | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells it from the other comparisons of a family."""
        return self.left, self.right, self.metric.name

    def sign_shown(self, alpha: float = 0.05) -> int:
        """+1 or -1 where the corrected p is below `alpha`, by the sign of the difference; else 0."""
        return 0 if self.holm is None or self.holm >= alpha else int(np.sign(self.value.mean))


def summarize(runs: Sequence[Run]) -> list[Condition]:
    """Final values per condition, base first; differences are to all base runs together, one Holm family."""
    groups = group_by_condition(runs)
    base = [run for run in runs if run.is_base]
    whole = {metric.name: whole_runs(runs, metric) for metric in TABLE_METRICS}
    comparisons = []
    for label, group in groups.items():
        if base and not group[0].is_base:
            compared = (compare(label, group, base_name(runs), base, m, whole[m.name]) for m in TABLE_METRICS)
            comparisons += [comparison for comparison in compared if comparison is not None]
    corrected = {c.key: c for c in correct(comparisons)}
    result = []
    for label, group in groups.items():
        ending = {}
        for metric in TABLE_METRICS:
            having = [run for run in group if run.final(metric) is not None]
            ending[metric.name] = [run for run in having if str(run.path) in whole[metric.name]] or having
        differences = {m: c for (left, _, m), c in corrected.items() if left == label}
        result.append(Condition(label, group, ending, differences))
    return result


def runs_of(conditions: Sequence[Condition]) -> list[Run]:
    """All runs of the conditions."""
    return [run for condition in conditions for run in condition.runs]


def base_name(runs: Sequence[Run]) -> str:
    """Label of the base, or of several bases together."""
    return " + ".join(dict.fromkeys(run.label for run in runs if run.is_base))


def whole_runs(runs: Sequence[Run], metric: Metric) -> set[str]:
    """Paths of the runs whose values of `metric` can be compared: their curves end where the longest ends, nearly.

    GLUE is of a run's last step.
    """
    if metric is GLUE:
        ends = {str(run.path): run.final_step for run in runs if run.measured.glue}
    else:
        ends = {str(run.path): curve.steps[-1] for run in runs if len(curve := run.metric(metric))}
    return {path for path, end in ends.items() if end >= WHOLE * max(ends.values())}


def compare(
    left: str, left_runs: Sequence[Run], right: str, right_runs: Sequence[Run], metric: Metric, whole: set[str]
) -> Comparison | None:
    """Difference of final values between two groups of runs, of those in `whole`; None where a side has no value."""
    sides = [
        [(run.seed, run.final(metric)) for run in group if str(run.path) in whole] for group in (left_runs, right_runs)
    ]
    if not all(sides):
        return None
    return Comparison(left, right, metric, difference(*sides))


def correct(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The same comparisons with p corrected over all of them (Holm)."""
    corrected = holm({c.key: c.value.p for c in comparisons})
    return [Comparison(c.left, c.right, c.metric, c.value, corrected.get(c.key)) for c in comparisons]


def control_pairs(conditions: Sequence[Condition]) -> list[tuple[Condition, Condition]]:
    """(condition, control) wherever a control has exactly the λ over steps of a condition that is no control."""
    pairs = []
    for control in (c for c in conditions if c.role == "control"):
        schedule = control.runs[0].describe_schedule()
        twins = [c for c in conditions if c.role in ("suppress", "promote", "release")]
        pairs += [(twin, control) for twin in twins if twin.runs[0].describe_schedule() == schedule]
    return pairs


def compare_to_controls(conditions: Sequence[Condition], runs: Sequence[Run]) -> list[Comparison]:
    """Differences of conditions to their controls in every metric that both have, one Holm family."""
    result = []
    for metric in TABLE_METRICS:
        whole = whole_runs(runs, metric)
        for condition, control in control_pairs(conditions):
            comparison = compare(condition.label, condition.runs, control.label, control.runs, metric, whole)
            result += [comparison] if comparison is not None else []
    return correct(result)
