"""Curves and onsets as they would have come out with other evaluation sentences: the bootstrap over items.

UAS resamples whole sentences (their edges stand or fall together), and chooses the best head of each relation anew in
every replicate. BLiMP resamples pairs within their sets. A replicate draws the same items at every step, so that what
is common to all steps cancels, and the same in every run with the same items.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_sas.core.cli import InputError
from megatron_sas.onsets.offline import strongest_bends
from megatron_sas.report.trajectories import Run
from megatron_sas.trajectory.points import BlimpItems, UasItems, point_directory, read_items


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
    """Replicates of the UAS and BLiMP curves of a run, for those of `run.item_metrics` that its items hold.

    Raises `InputError` where a file of items is broken or does not match the run's other points.
    """
    if not run.item_metrics:
        return {}
    rows: dict[str, list[np.ndarray]] = {"uas": [], "blimp": []}
    steps: dict[str, list[int]] = {"uas": [], "blimp": []}
    samplers: dict[str, UasSampler | BlimpSampler] = {}
    directory = run.measured.directory
    for step in run.measured.item_steps:
        items = read_items(directory, step)
        for name, sampler, part in (("uas", UasSampler, items.uas), ("blimp", BlimpSampler, items.blimp)):
            if name not in run.item_metrics or part is None or not len(part.correct):
                continue
            if name not in samplers:
                samplers[name] = sampler(part, replicates, seed)
            if not samplers[name].takes(part):
                where = point_directory(directory, step)
                raise InputError(f"{where}: other items than in the run's first point; measure the run again")
            rows[name].append(samplers[name].values(part))
            steps[name].append(step)
    return {name: ItemCurves(np.array(steps[name], np.float64), np.stack(rows[name], axis=1)) for name in samplers}


def onset_interval(curves: ItemCurves, delta: float, sign: int = 1, confidence: float = 0.95) -> ItemOnset:
    """The onset of every replicate, and the percentile interval over those that have one (at least half must)."""
    steps = strongest_bends(curves.steps, curves.replicates, delta, sign)
    known = steps[np.isfinite(steps)]
    if not len(steps) or len(known) < len(steps) / 2:
        return ItemOnset(steps, None, None)
    low, high = np.quantile(known, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return ItemOnset(steps, float(low), float(high))


class UasSampler:
    """Draws the sentences of `items` with replacement."""

    def __init__(self, items: UasItems, replicates: int, seed: int) -> None:
        self.edges = items.edges
        sentences, sentence = np.unique(items.edges[:, 0], return_inverse=True)
        rng = np.random.default_rng([seed, 0])
        draws = _draws(rng, len(sentences), replicates)
        order = np.argsort(items.edges[:, 1], kind="stable")
        bounds = np.flatnonzero(np.diff(items.edges[order, 1], prepend=-1))
        # One matrix (B, edges) per relation; float32 counts edges exactly up to 2²⁴.
        self.parts = [(edges, draws[:, sentence[edges]].astype(np.float32)) for edges in np.split(order, bounds[1:])]

    def takes(self, items: UasItems) -> bool:
        """Whether `items` are of the same edges."""
        return np.array_equal(self.edges, items.edges)

    def values(self, items: UasItems) -> np.ndarray:
        """UAS of each replicate, float64 (B,): best head per relation, weighted by the edges drawn."""
        hits, total = 0.0, 0.0
        for edges, weights in self.parts:
            correct = items.correct[edges].reshape(len(edges), -1).astype(np.float32)
            hits = hits + (weights @ correct).max(axis=1).astype(np.float64)
            total = total + weights.sum(axis=1, dtype=np.float64)
        return hits / total


class BlimpSampler:
    """Draws the pairs of `items` with replacement within each set."""

    def __init__(self, items: BlimpItems, replicates: int, seed: int) -> None:
        self.sets = items.sets
        self.parts = []
        for index in np.unique(items.sets):
            pairs = np.flatnonzero(items.sets == index)
            rng = np.random.default_rng([seed, 1, int(index)])
            self.parts.append((pairs, _draws(rng, len(pairs), replicates).astype(np.float32)))

    def takes(self, items: BlimpItems) -> bool:
        """Whether `items` are of the same pairs."""
        return np.array_equal(self.sets, items.sets)

    def values(self, items: BlimpItems) -> np.ndarray:
        """Mean accuracy over the sets of each replicate, float64 (B,)."""
        correct = items.correct.astype(np.float32)
        return np.mean(
            [weights @ correct[pairs] / len(pairs) for pairs, weights in self.parts], axis=0, dtype=np.float64
        )


def _draws(rng: np.random.Generator, count: int, replicates: int) -> np.ndarray:
    """How often each of `count` items is drawn in each replicate, int64 (B, count); every row sums to `count`."""
    drawn = rng.integers(0, count, (replicates, count)) + count * np.arange(replicates)[:, None]
    return np.bincount(drawn.ravel(), minlength=replicates * count).reshape(replicates, count)
