"""Curves and onsets as they would have come out with other evaluation sentences: the bootstrap over items.

UAS resamples whole sentences (their edges stand or fall together), and chooses the best head of each relation again in
every replicate. BLiMP resamples pairs within their sets. A replicate draws the same items at every step, so that what
is common to all steps cancels, and the same in every run with the same items.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_sas.core.cli import InputError
from megatron_sas.evaluation.items import Sampler
from megatron_sas.evaluation.registry import EVALUATIONS
from megatron_sas.onsets.offline import onset_steps
from megatron_sas.report.statistics import Interval
from megatron_sas.report.trajectories import Run
from megatron_sas.trajectory.points import point_directory, read_items


@dataclass(frozen=True)
class ItemOnset:
    """Onset replicates (B,), NaN where one never bends, and their percentile interval (None if most are NaN)."""

    steps: np.ndarray
    interval: Interval | None


def resample_curves(run: Run, replicates: int, seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Replicates of the curves of `run.item_metrics`, by name, for those that the run's items hold.

    Each is rising steps (T,) and values (B, T), float64. Raises `InputError` where a file of items is broken or does
    not match the run's other points.
    """
    rows: dict[str, dict[int, np.ndarray]] = {}
    samplers: dict[str, Sampler] = {}
    directory = run.measured.directory
    for step in run.measured.item_steps if run.item_metrics else ():
        for evaluation, items in read_items(directory, step).items():
            name = EVALUATIONS[evaluation].metrics[0].name
            if name not in run.item_metrics or not len(items):
                continue
            if name not in samplers:
                samplers[name] = items.sampler(replicates, seed)
            if not samplers[name].takes(items):
                where = point_directory(directory, step)
                raise InputError(f"{where}: other items than in the run's first point; measure the run again")
            rows.setdefault(name, {})[step] = samplers[name].values(items)
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
