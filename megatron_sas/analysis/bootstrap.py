"""Curves and onsets as they would have come out with other evaluation sentences: the bootstrap over items.

UAS resamples whole sentences (their edges stand or fall together), and chooses the best head of each relation anew in
every replicate. BLiMP resamples pairs within their sets. A replicate draws the same items at every step, so that what
is common to all steps cancels, and the same in every run with the same items.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from megatron_sas.analysis.trajectories import Run
from megatron_sas.cli import InputError
from megatron_sas.evaluation.onsets import strongest_bends


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
    for step, path, items in _read_items(run):
        for name, sampler, key in (("uas", UasSampler, "uas_edges"), ("blimp", BlimpSampler, "blimp_set")):
            if name not in run.item_metrics or key not in items or not len(items[key]):
                continue
            if name not in samplers:
                samplers[name] = sampler(items[key], replicates, seed)
            if not np.array_equal(samplers[name].items, items[key]):
                raise InputError(f"{path}: other items than in the run's first point; measure the run again")
            rows[name].append(samplers[name].values(items))
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
    """Draws sentences with replacement: `items` int32 (E, 2) are [sentence, relation] of each edge."""

    def __init__(self, items: np.ndarray, replicates: int, seed: int) -> None:
        self.items = items
        sentences, sentence = np.unique(items[:, 0], return_inverse=True)
        rng = np.random.default_rng([seed, 0])
        draws = _draws(rng, len(sentences), replicates)
        order = np.argsort(items[:, 1], kind="stable")
        bounds = np.flatnonzero(np.diff(items[order, 1], prepend=-1))
        # One matrix (B, edges) per relation; float32 counts edges exactly up to 2²⁴.
        self.parts = [(edges, draws[:, sentence[edges]].astype(np.float32)) for edges in np.split(order, bounds[1:])]

    def values(self, items: dict[str, np.ndarray]) -> np.ndarray:
        """UAS of each replicate, float64 (B,): best head per relation, weighted by the edges drawn."""
        width = int(np.prod(items["uas_shape"]))
        hits, total = 0.0, 0.0
        for edges, weights in self.parts:
            correct = np.unpackbits(items["uas_correct"][edges], axis=1, count=width).astype(np.float32)
            hits = hits + (weights @ correct).max(axis=1).astype(np.float64)
            total = total + weights.sum(axis=1, dtype=np.float64)
        return hits / total


class BlimpSampler:
    """Draws pairs with replacement within each set: `items` int16 (P,) are the pairs' sets."""

    def __init__(self, items: np.ndarray, replicates: int, seed: int) -> None:
        self.items = items
        self.parts = []
        for index in np.unique(items):
            pairs = np.flatnonzero(items == index)
            rng = np.random.default_rng([seed, 1, int(index)])
            self.parts.append((pairs, _draws(rng, len(pairs), replicates).astype(np.float32)))

    def values(self, items: dict[str, np.ndarray]) -> np.ndarray:
        """Mean accuracy over the sets of each replicate, float64 (B,)."""
        correct = items["blimp_correct"].astype(np.float32)
        return np.mean(
            [weights @ correct[pairs] / len(pairs) for pairs, weights in self.parts], axis=0, dtype=np.float64
        )


def _draws(rng: np.random.Generator, count: int, replicates: int) -> np.ndarray:
    """How often each of `count` items is drawn in each replicate, int64 (B, count); every row sums to `count`."""
    drawn = rng.integers(0, count, (replicates, count)) + count * np.arange(replicates)[:, None]
    return np.bincount(drawn.ravel(), minlength=replicates * count).reshape(replicates, count)


def _read_items(run: Run) -> Iterator[tuple[int, Path, dict[str, np.ndarray]]]:
    for step, path in sorted(run.measured.items.items()):
        try:
            with np.load(path, allow_pickle=False) as archive:
                yield step, path, {name: archive[name] for name in archive.files}
        except (OSError, ValueError, EOFError, BadZipFile) as error:
            raise InputError(f"{path}: cannot be read ({error}); remove the point and measure it again") from None
