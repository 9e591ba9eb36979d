"""When the curves of every run break, how sure that is, and which of structure and capabilities comes first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import stats

from megatron_sas.core.cli import progress
from megatron_sas.evaluation.base import Metric
from megatron_sas.evaluation.minimal_pairs import BLIMP
from megatron_sas.evaluation.registry import EVALUATIONS
from megatron_sas.evaluation.uas import UAS
from megatron_sas.onsets.offline import ChangePoint, Onset, break_point, change_point
from megatron_sas.report.bootstrap import ItemOnset, onset_interval, resample_curves
from megatron_sas.report.statistics import Difference, Estimate, estimate
from megatron_sas.report.trajectories import METRICS, Curve, Run


@dataclass(frozen=True)
class RunOnset:
    """When one curve of one run breaks: strongest bend, change-point fit, and the bend's replicates over items."""

    strongest: Onset
    change: ChangePoint
    items: ItemOnset | None = None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the bend over resampled items; None where there are none."""
        found = self.items
        return None if found is None or found.low is None or found.high is None else (found.low, found.high)

    @property
    def change_interval(self) -> tuple[float, float] | None:
        """95 % interval of the change point, which is another estimate than the bend; None where there is none."""
        return None if self.change.low is None or self.change.high is None else (self.change.low, self.change.high)


@dataclass(frozen=True)
class RunOrder:
    """BLiMP's onset minus UAS's of one run, both clear, and its replicates over items (None without items)."""

    run: Run
    lag: float
    replicates: np.ndarray | None

    def share(self, sign: int) -> float | None:
        """Share of replicates with UAS strictly first (1), at the same step (0), or strictly last (-1)."""
        if self.replicates is None:
            return None
        known = self.replicates[np.isfinite(self.replicates)]
        return float(np.mean(np.sign(known) == sign)) if len(known) else None


@dataclass(frozen=True)
class Order:
    """Structure against capabilities over the runs of a condition in which both break clearly.

    `lag` is BLiMP's onset minus UAS's (`mean_distance`); `first` and `last` count runs with UAS strictly first and
    last; `sign_p` is the two-sided sign test over these. `items` is the 95 % percentile interval of the mean lag over
    resampled items, None unless every run has items. `spacing` is the widest distance of evaluations around these
    onsets: nothing shorter can be told.
    """

    runs: tuple[RunOrder, ...]
    num_runs: int
    lag: Estimate
    first: int
    last: int
    sign_p: float | None
    items: tuple[float, float] | None
    spacing: float

    @property
    def established(self) -> bool:
        """Whether the intervals over seeds and over items leave 0 out, and the mean is at least one evaluation away."""
        seeds = self.lag.interval(0.95)
        intervals = [seeds, self.items] if self.items else [seeds]
        leaves_out = all(i is not None and not i[0] <= 0 <= i[1] for i in intervals)
        return leaves_out and abs(self.lag.mean) >= self.spacing


Onsets = dict[str, dict[str, RunOnset]]  # run path -> metric name -> onset; metrics without a curve are absent


def default_delta(runs: Sequence[Run]) -> float:
    """A tenth of the median run's length, but no less than the widest usual gap between evaluations of any run.

    Of two middle lengths the lower counts; the median, so that one run that has just begun does not decide.
    """
    length = sorted(run.final_step for run in runs)[(len(runs) - 1) // 2]
    return float(max([length / 10, 1, *(spacing(run.metric(metric)) or 0 for run in runs for metric in METRICS)]))


def spacing(curve: Curve) -> float | None:
    """The usual distance in steps between a curve's evaluations; None for fewer than two."""
    return float(np.median(np.diff(curve.steps))) if len(curve) > 1 else None


def find_onsets(runs: Sequence[Run], delta: float, replicates: int = 0, seed: int = 0) -> Onsets:
    """Onsets of every curve of every run; `replicates` over items where a run has them (0: none)."""
    found: Onsets = {}
    directions = {metric.name: metric.direction for metric in METRICS}
    for run in progress(runs, desc="onsets", unit="run"):
        onsets = {}
        for metric in METRICS:
            curve = run.metric(metric)
            if len(curve):
                onset = break_point(curve.steps, curve.values, delta, metric.direction, item_error(run, metric))
                onsets[metric.name] = RunOnset(onset, change_point(curve.steps, curve.values, metric.direction))
        if replicates:
            for name, curves in resample_curves(run, replicates, seed).items():
                if name in onsets and onsets[name].strongest.step is not None:
                    interval = onset_interval(curves, delta, directions[name])
                    onsets[name] = replace(onsets[name], items=interval)
        found[str(run.path)] = onsets
    return found


def item_error(run: Run, metric: Metric) -> float | None:
    """Standard error of one value of a curve for its number of edges, pairs or other items; None where not known.

    √(p(1-p)/n) with p the curve's mean and n what the metric's owner makes of the recorded counts.
    """
    owner = next(e for e in EVALUATIONS.values() if metric in e.metrics)
    if owner.item_counts is None or metric != owner.metrics[0]:
        return None
    table, count = owner.item_counts
    rows = run.nested(table)
    number = owner.independent_items(_counts(rows, count), len(rows))
    values = run.metric(metric).values
    if not number or not len(values):
        return None
    p = float(np.clip(values.mean(), 0, 1))
    return float(np.sqrt(p * (1 - p) / number))


def _counts(rows: dict[str, Any], key: str) -> list[int]:
    """The positive numbers `key` of those rows that have one."""
    found = [row.get(key) for row in rows.values() if isinstance(row, dict)]
    return [count for count in found if isinstance(count, int) and count > 0]


def detected_onset(onsets: Onsets, run: Run, metric: Metric) -> Onset | None:
    """A run's onset where it is clear, else None."""
    onset = onsets[str(run.path)].get(metric.name)
    return onset.strongest if onset and onset.strongest.detected else None


def widest(onsets: Sequence[Onset]) -> float:
    """The widest distance of evaluations around these onsets; 0 for none."""
    return max((onset.spacing or 0.0 for onset in onsets), default=0.0)


def order_of(runs: Sequence[Run], onsets: Onsets) -> Order | None:
    """Which comes first in a condition, structure (UAS) or capabilities (BLiMP); None where no run shows both."""
    each, detected = [], []
    for run in runs:
        uas, blimp = detected_onset(onsets, run, UAS), detected_onset(onsets, run, BLIMP)
        if uas is None or blimp is None:
            continue
        detected += [uas, blimp]
        items = [onsets[str(run.path)][metric.name].items for metric in (UAS, BLIMP)]
        each.append(RunOrder(run, blimp.step - uas.step, items[1].steps - items[0].steps if all(items) else None))
    if not each:
        return None
    first, last = sum(e.lag > 0 for e in each), sum(e.lag < 0 for e in each)
    return Order(
        runs=tuple(each),
        num_runs=len(runs),
        lag=mean_distance([e.lag for e in each], widest(detected)),
        first=first,
        last=last,
        sign_p=float(stats.binomtest(first, first + last).pvalue) if first + last else None,
        items=_interval_over_items([e.replicates for e in each]),
        spacing=widest(detected),
    )


def mean_step(onsets: Sequence[Onset]) -> Estimate:
    """Mean step of onsets over seeds, its standard error no smaller than rounding to evaluations leaves (below)."""
    found = estimate([onset.step for onset in onsets])
    if found.error is None:
        return found
    return replace(found, error=max(found.error, widest(onsets) / np.sqrt(12 * found.count)))


def mean_distance(distances: Sequence[float], spacing: float) -> Estimate:
    """Mean distance of two onsets over seeds, with a standard error no smaller than rounding to evaluations leaves.

    Onsets lie on a grid of evaluations `spacing` apart, so each is off by up to half of it: a standard deviation of
    spacing/√6 for a distance. Without this floor, seeds that happen to agree to the evaluation would look certain.
    """
    found = estimate(distances)
    if found.error is None:
        return found
    return replace(found, error=max(found.error, spacing / np.sqrt(6 * found.count)))


def onset_difference(found: Difference, spacing: float) -> Difference:
    """The difference of two conditions' onsets, its standard error no smaller than rounding to evaluations leaves.

    As in `mean_distance`: each onset has a standard deviation of spacing/√12 from the grid, which gives spacing/√(6n)
    for n runs on either side. Where the onsets have no spread at all, Welch's test has the freedom of the smaller side.
    """
    if min(found.counts) < 2 or not spacing:
        return found
    floor = spacing * np.sqrt(sum(1 / count for count in found.counts) / 12)
    error = float(max(found.error, floor))
    freedom = float(min(found.counts) - 1) if found.freedom is None else found.freedom
    return replace(found, error=error, freedom=freedom, p=float(2 * stats.t.sf(abs(found.mean) / error, freedom)))


def _interval_over_items(replicates: Sequence[np.ndarray | None]) -> tuple[float, float] | None:
    """95 % percentile interval of the mean over runs; replicate b draws the same items in every run."""
    if any(r is None for r in replicates):
        return None
    means = np.mean(replicates, axis=0)
    means = means[np.isfinite(means)]
    if len(means) < len(replicates[0]) / 2:
        return None
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
