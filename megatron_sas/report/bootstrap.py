"""Curves and onsets as they would have come out with other evaluation sentences: the bootstrap over items.

UAS resamples whole sentences (their edges stand or fall together), and chooses the best head of each relation anew in
every replicate. BLiMP resamples pairs within their sets. A replicate draws the same items at every step, so that what
is common to all steps cancels, and the same in every run with the same items.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_sas.core.cli import InputError
from megatron_sas.evaluation.items import Items
from megatron_sas.evaluation.registry import EVALUATIONS
from megatron_sas.onsets.offline import onset_steps
from megatron_sas.report.trajectories import Run
from megatron_sas.trajectory.points import point_directory, read_items


@dataclass(frozen=True)
class ItemCurves:
    """Replicates of a run's curve, float64 (B, T), at rising steps (T,)."""

    steps: np.ndarray
    replicates: np.ndarray


@dataclass(frozen=True)
class ItemOnset:
    """Onset replicates (B,), NaN where one never bends, and their percentile interval (None if most are NaN)."""

    steps: np.ndarray
    low: float | None
    high: float | None


def resample_curves(run: Run, replicates: int, seed: int) -> dict[str, ItemCurves]:
    """Replicates of the curves of `run.item_metrics`, by name, for those that the run's items hold.

    Raises `InputError` where a file of items is broken or does not match the run's other points.
    """
    if not run.item_metrics:
        return {}
    rows: dict[str, list[np.ndarray]] = {}
    steps: dict[str, list[int]] = {}
    first: dict[str, Items] = {}
    resample: dict[str, Callable[[Items], np.ndarray]] = {}
    directory = run.measured.directory
    for step in run.measured.item_steps:
        for evaluation, items in read_items(directory, step).items():
            name = EVALUATIONS[evaluation].metrics[0].name
            if name not in run.item_metrics or not len(items):
                continue
            if name not in first:
                first[name], resample[name] = items, items.resampler(replicates, seed)
            if not items.are_those_of(first[name]):
                where = point_directory(directory, step)
                raise InputError(f"{where}: other items than in the run's first point; measure the run again")
            rows.setdefault(name, []).append(resample[name](items))
            steps.setdefault(name, []).append(step)
    return {name: ItemCurves(np.array(steps[name], np.float64), np.stack(rows[name], axis=1)) for name in rows}


def onset_interval(curves: ItemCurves, delta: float, sign: int = 1, confidence: float = 0.95) -> ItemOnset:
    """The onset of every replicate, and the percentile interval over those that have one (at least half must)."""
    steps = onset_steps(curves.steps, curves.replicates, delta, sign)
    known = steps[np.isfinite(steps)]
    if not len(steps) or len(known) < len(steps) / 2:
        return ItemOnset(steps, None, None)
    low, high = np.quantile(known, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return ItemOnset(steps, float(low), float(high))
