"""Final values per condition, and their differences: to the base, and of a regularized condition to its control."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from megatron_sas.evaluation.base import Metric
from megatron_sas.glue.tasks import GLUE
from megatron_sas.report.statistics import Difference, Estimate, difference, estimate, holm
from megatron_sas.report.trajectories import TABLE_METRICS, Run, group_by_condition

WHOLE = 0.95  # a run whose curve ends before this share of the longest does not enter comparisons


@dataclass(frozen=True)
class Condition:
    """Runs of one label; `base` is all base runs together, which others are compared with (None if there are none).

    By metric name, `whole` has the runs whose final values can be compared (`whole_runs`), `ending` those that final
    values are of: the whole ones or, where there are none, all that have values, which are then compared with nothing.
    `difference` is to the base, empty for the base.
    """

    label: str
    runs: list[Run]
    whole: dict[str, list[Run]]
    ending: dict[str, list[Run]]
    base: Condition | None = None
    difference: dict[str, Comparison] = field(default_factory=dict)

    @cached_property
    def final(self) -> dict[str, Estimate]:
        """Final values by metric name; absent where no run has one."""
        return {name: estimate(values) for name, values in final_values(self.ending).items()}

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
    whole = {metric.name: whole_runs(runs, metric) for metric in TABLE_METRICS}

    def condition(label: str, group: list[Run], base: Condition | None = None) -> Condition:
        having = {metric.name: [run for run in group if run.final(metric) is not None] for metric in TABLE_METRICS}
        reaching = {name: [run for run in some if run.path in whole[name]] for name, some in having.items()}
        ending = {name: reaching[name] or some for name, some in having.items()}
        return Condition(label, group, reaching, ending, base)

    base_runs = [run for run in runs if run.is_base]
    base = condition(" + ".join(dict.fromkeys(run.label for run in base_runs)), base_runs) if base_runs else None
    conditions = [condition(label, group, base) for label, group in group_by_condition(runs).items()]
    differences = correct(compare(c, base, metric) for c in conditions if not c.is_base for metric in TABLE_METRICS)
    return [replace(c, difference={d.metric.name: d for d in differences if d.left == c.label}) for c in conditions]


def runs_of(conditions: Sequence[Condition]) -> list[Run]:
    """All runs of the conditions."""
    return [run for condition in conditions for run in condition.runs]


def final_values(runs: dict[str, list[Run]]) -> dict[str, list[float]]:
    """The final value of each run, by metric name, for the metrics that have runs."""
    return {m.name: [run.final(m) for run in runs[m.name]] for m in TABLE_METRICS if runs[m.name]}


def whole_runs(runs: Sequence[Run], metric: Metric) -> set[Path]:
    """Paths of the runs whose values of `metric` can be compared: their curves end where the longest ends, nearly.

    GLUE is of a run's last step.
    """
    if metric is GLUE:
        ends = {run.path: run.final_step for run in runs if run.measured.glue}
    else:
        ends = {run.path: curve.steps[-1] for run in runs if len(curve := run.metric(metric))}
    return {path for path, end in ends.items() if end >= WHOLE * max(ends.values())}


def compare(left: Condition, right: Condition | None, metric: Metric) -> Comparison | None:
    """Difference of final values of the whole runs of two conditions; None where a side has none."""
    if right is None or not left.whole[metric.name] or not right.whole[metric.name]:
        return None
    sides = [[(run.seed, run.final(metric)) for run in side.whole[metric.name]] for side in (left, right)]
    return Comparison(left.label, right.label, metric, difference(*sides))


def correct(comparisons: Iterable[Comparison | None]) -> list[Comparison]:
    """The comparisons that exist, with p corrected over all of them (Holm)."""
    known = [c for c in comparisons if c is not None]
    corrected = holm({c.key: c.value.p for c in known})
    return [replace(c, holm=corrected.get(c.key)) for c in known]


def control_pairs(conditions: Sequence[Condition]) -> list[tuple[Condition, Condition]]:
    """(condition, control) wherever a control has exactly the λ over steps of a condition that is no control."""
    twins = [c for c in conditions if c.role in ("suppress", "promote", "release")]
    schedule = {c.label: c.runs[0].describe_schedule() for c in conditions}
    controls = [c for c in conditions if c.role == "control"]
    return [(c, control) for control in controls for c in twins if schedule[c.label] == schedule[control.label]]


def compare_to_controls(conditions: Sequence[Condition]) -> list[Comparison]:
    """Differences of conditions to their controls in every metric that both have, one Holm family."""
    pairs = control_pairs(conditions)
    return correct(compare(*pair, metric) for metric in TABLE_METRICS for pair in pairs)
