"""When the curves of every run break, how sure that is, and which of structure and capabilities comes first.

How sure it is with these evaluation sentences, a bootstrap over items says. UAS resamples whole sentences (their edges
stand or fall together), and chooses the best head of each relation again in every replicate. BLiMP resamples pairs
within their sets. A replicate draws the same items at every step, so that what is common to all steps cancels, and the
same in every run with the same items.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy import stats

from megatron_sas.core.cli import InputError, progress
from megatron_sas.evaluation.base import Evaluation, Metric
from megatron_sas.evaluation.items import Items
from megatron_sas.evaluation.minimal_pairs import BLIMP
from megatron_sas.evaluation.registry import EVALUATIONS
from megatron_sas.evaluation.uas import UAS
from megatron_sas.onsets.offline import (
    ChangePoint,
    Onset,
    break_point,
    change_point,
    is_recovery,
    largest_by_chance,
    onset_steps,
)
from megatron_sas.report.statistics import Difference, Estimate, Interval, estimate, two_sided_p
from megatron_sas.report.trajectories import METRICS, Curve, Run
from megatron_sas.trajectory.points import point_directory, read_items


@dataclass(frozen=True)
class ItemOnset:
    """Onset replicates (B,), NaN where one never bends, and their percentile interval (None if most are NaN)."""

    steps: np.ndarray
    interval: Interval | None


@dataclass(frozen=True)
class RunOnset:
    """When one curve of one run breaks: strongest bend, change-point fit, and the bend's replicates over items.

    `above_offsets`: how far UAS, at its best after the bend, is above that of the best fixed offsets, with a 95 %
    interval for its number of edges; None for other curves, and where one of these is not recorded.
    """

    strongest: Onset
    change: ChangePoint
    items: ItemOnset | None = None
    above_offsets: tuple[float, Interval] | None = None

    @property
    def interval(self) -> Interval | None:
        """95 % interval of the bend over resampled items; None where there are none."""
        return self.items.interval if self.items else None


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
    onsets: nothing shorter can be resolved.
    """

    runs: tuple[RunOrder, ...]
    num_runs: int
    lag: Estimate
    first: int
    last: int
    sign_p: float | None
    items: Interval | None
    spacing: float

    @property
    def established(self) -> bool:
        """Whether the intervals over seeds and over items leave 0 out, and the mean is at least one evaluation away."""
        seeds = self.lag.interval(0.95)
        intervals = [seeds, self.items] if self.items else [seeds]
        leaves_out = all(i is not None and not i[0] <= 0 <= i[1] for i in intervals)
        return leaves_out and abs(self.lag.mean) >= self.spacing

    @property
    def shares_first(self) -> list[str]:
        """Of each run with replicates, the share that has structure first, in words."""
        return [f"{share:.0%}" for run in self.runs if (share := run.share(1)) is not None]


Onsets = dict[Path, dict[str, RunOnset]]  # run path -> metric name -> onset; metrics without a curve are absent


def default_delta(runs: Sequence[Run]) -> float:
    """A tenth of the median run's length, but no less than the widest usual gap between evaluations of any run.

    Of two middle lengths the lower counts; the median, so that one run that has just begun does not decide.
    """
    length = sorted(run.final_step for run in runs)[(len(runs) - 1) // 2]
    curves = [curve for run in runs for metric in METRICS if len(curve := run.metric(metric)) > 1]
    return float(max([length / 10, 1, *(np.median(np.diff(curve.steps)) for curve in curves)]))


def find_onsets(runs: Sequence[Run], delta: float, replicates: int = 0, seed: int = 0) -> Onsets:
    """Onsets of every curve of every run; `replicates` over items where a run has them (0: none)."""
    onsets: Onsets = {}
    for run in progress(runs, desc="onsets", unit="run"):
        curves = {metric: curve for metric in METRICS if len(curve := run.metric(metric))}
        onsets[run.path] = {m.name: _curve_onset(run, m, curve, delta) for m, curve in curves.items()}
        resampled = resample_curves(run, replicates, seed) if replicates else {}
        for metric in curves:
            onset = onsets[run.path][metric.name]
            if metric.name in resampled and onset.strongest.step is not None:
                items = onset_interval(*resampled[metric.name], delta, metric.direction)
                onsets[run.path][metric.name] = replace(onset, items=items)
    return onsets


def _curve_onset(run: Run, metric: Metric, curve: Curve, delta: float) -> RunOnset:
    """The strongest bend, clear only if it is an onset: no recovery, and of UAS no rise below fixed offsets."""
    bend = break_point(curve.steps, curve.values, delta, metric.direction, item_error(run, metric))
    above = _above_offsets(run, curve, bend) if metric == UAS and bend.step is not None else None
    reason = bend.reason
    if bend.step is not None and not bend.at_edge:
        if not bend.detected:
            reason = _within_noise(run, metric, curve, bend)
        elif is_recovery(curve.steps, curve.values, delta, metric.direction, bend):
            reason = "a recovery: it returns to a level that it had before"
        elif above and above[1][0] <= 0:
            reason = "afterwards it is not above fixed offsets"
    bend = replace(bend, detected=bend.detected and not reason, reason=reason)
    return RunOnset(bend, change_point(curve.steps, curve.values, metric.direction), above_offsets=above)


def _within_noise(run: Run, metric: Metric, curve: Curve, bend: Onset) -> str:
    """Why a bend is not clear; where it rests on few items, how many would make one of its size clear."""
    if bend.noise != item_error(run, metric):
        return "within noise"
    number = sum(_item_counts(run, metric)[1])
    enough = number * (largest_by_chance(bend.noise, len(curve)) / bend.strength) ** 2
    return f"within the noise of {number} items; {enough:.0f} would carry it"


def _above_offsets(run: Run, curve: Curve, bend: Onset) -> tuple[float, Interval] | None:
    best, baseline = float(curve.values[curve.steps >= bend.step].max()), run.uas_baseline
    number = _independent_items(run, UAS)
    if baseline is None or not number:
        return None
    difference, error = best - baseline, float(np.sqrt(best * (1 - best) / number))
    return difference, (difference - 1.96 * error, difference + 1.96 * error)


def _item_counts(run: Run, metric: Metric) -> tuple[type[Evaluation], list[int], int]:
    """Who owns a metric, and of its last table the positive counts and the number of rows; no rows where not known."""
    owner = next(e for e in EVALUATIONS.values() if metric in e.metrics)
    if owner.item_counts is None or metric != owner.metrics[0]:
        return owner, [], 0
    table, key = owner.item_counts
    rows = run.nested(table)
    counts = [row.get(key) for row in rows.values() if isinstance(row, dict)]
    return owner, [n for n in counts if isinstance(n, int) and n > 0], len(rows)


def _independent_items(run: Run, metric: Metric) -> float:
    owner, counts, rows = _item_counts(run, metric)
    return owner.independent_items(counts, rows) if counts else 0.0


def item_error(run: Run, metric: Metric) -> float | None:
    """Standard error of one value of a curve for its number of edges, pairs or other items; None where not known.

    √(p(1-p)/n) with p the curve's mean and n what the metric's owner makes of the recorded counts.
    """
    number, values = _independent_items(run, metric), run.metric(metric).values
    if not number or not len(values):
        return None
    p = float(np.clip(values.mean(), 0, 1))
    return float(np.sqrt(p * (1 - p) / number))


def resample_curves(run: Run, replicates: int, seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Replicates of the curves of `run.item_metrics`, by name, for those that the run's items hold.

    Each is rising steps (T,) and values (B, T), float64. Raises `InputError` where a file of items is broken or does
    not match the run's other points.
    """
    rows: dict[str, dict[int, np.ndarray]] = {}
    first: dict[str, Items] = {}
    resample: dict[str, Callable[[Items], np.ndarray]] = {}
    directory = run.measured.directory
    for step in run.measured.item_steps if run.item_metrics else ():
        for evaluation, items in read_items(directory, step).items():
            name = EVALUATIONS[evaluation].metrics[0].name
            if name not in run.item_metrics or not len(items):
                continue
            if name not in first:
                first[name], resample[name] = items, items.resampler(replicates, seed)
            if not items.are_those_of(first[name]):
                where = point_directory(directory, step)
                raise InputError(f"{where}: other items than in the run's first point; measure the run again")
            rows.setdefault(name, {})[step] = resample[name](items)
    return {name: (np.array(list(r), np.float64), np.stack(list(r.values()), axis=1)) for name, r in rows.items()}


def onset_interval(steps: np.ndarray, curves: np.ndarray, delta: float, sign: int = 1) -> ItemOnset:
    """The onset of every replicate of a curve, and their 95 % interval."""
    onsets = onset_steps(steps, curves, delta, sign)
    return ItemOnset(onsets, percentile_interval(onsets))


def percentile_interval(values: np.ndarray) -> Interval | None:
    """The middle 95 % of the values that are finite; None unless at least half are."""
    known = values[np.isfinite(values)]
    if not len(known) or len(known) < len(values) / 2:
        return None
    low, high = np.quantile(known, [0.025, 0.975])
    return float(low), float(high)


def detected_onset(onsets: Onsets, run: Run, metric: Metric) -> Onset | None:
    """A run's onset where it is clear, else None."""
    onset = onsets[run.path].get(metric.name)
    return onset.strongest if onset and onset.strongest.detected else None


def detected_onsets(onsets: Onsets, runs: Iterable[Run], *metrics: Metric) -> list[tuple[Run, list[Onset]]]:
    """The runs in which the onsets of all these metrics are clear, each with these onsets."""
    each = [(run, [detected_onset(onsets, run, metric) for metric in metrics]) for run in runs]
    return [(run, detected) for run, detected in each if None not in detected]


def widest(onsets: Iterable[Onset]) -> float:
    """The widest distance of evaluations around these onsets; 0 for none."""
    return max((onset.spacing or 0.0 for onset in onsets), default=0.0)


def order_of(runs: Sequence[Run], onsets: Onsets) -> Order | None:
    """Which comes first in a condition, structure (UAS) or capabilities (BLiMP); None where no run shows both."""
    detected = detected_onsets(onsets, runs, UAS, BLIMP)
    if not detected:
        return None
    each = []
    for run, (uas, blimp) in detected:
        items = [onsets[run.path][metric.name].items for metric in (UAS, BLIMP)]
        each.append(RunOrder(run, blimp.step - uas.step, items[1].steps - items[0].steps if all(items) else None))
    first, last = sum(e.lag > 0 for e in each), sum(e.lag < 0 for e in each)
    spacing = widest(onset for _, both in detected for onset in both)
    replicates = [e.replicates for e in each]  # replicate b draws the same items in every run
    return Order(
        runs=tuple(each),
        num_runs=len(runs),
        lag=mean_distance([e.lag for e in each], spacing),
        first=first,
        last=last,
        sign_p=float(stats.binomtest(first, first + last).pvalue) if first + last else None,
        items=None if any(r is None for r in replicates) else percentile_interval(np.mean(replicates, axis=0)),
        spacing=spacing,
    )


def mean_step(onsets: Sequence[Onset]) -> Estimate:
    """Mean step of onsets over seeds, its standard error no smaller than rounding to evaluations leaves (below)."""
    return _at_least(estimate([onset.step for onset in onsets]), widest(onsets) / np.sqrt(12 * len(onsets)))


def mean_distance(distances: Sequence[float], spacing: float) -> Estimate:
    """Mean distance of two onsets over seeds, with a standard error no smaller than rounding to evaluations leaves.

    Onsets lie on a grid of evaluations `spacing` apart, so each is off by up to half of it: a standard deviation of
    spacing/√6 for a distance. Without this floor, seeds that happen to agree to the evaluation would look certain.
    """
    return _at_least(estimate(distances), spacing / np.sqrt(6 * len(distances)))


def _at_least(value: Estimate, floor: float) -> Estimate:
    return value if value.error is None else replace(value, error=float(max(value.error, floor)))


def onset_difference(value: Difference, spacing: float) -> Difference:
    """The difference of two conditions' onsets, its standard error no smaller than rounding to evaluations leaves.

    As in `mean_distance`: each onset has a standard deviation of spacing/√12 from the grid, which gives spacing/√(6n)
    for n runs on either side. Where the onsets have no spread at all, Welch's test has the freedom of the smaller side.
    """
    if min(value.counts) < 2 or not spacing:
        return value
    floor = spacing * np.sqrt(sum(1 / count for count in value.counts) / 12)
    error = float(max(value.error, floor))
    freedom = float(min(value.counts) - 1) if value.freedom is None else value.freedom
    return replace(value, error=error, freedom=freedom, p=two_sided_p(value.mean / error, freedom))
