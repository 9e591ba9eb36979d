"""Means over seeds, differences between conditions, and the correction of p-values for many of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Estimate:
    """Mean over runs and its standard error (None for a single run)."""

    mean: float
    error: float | None
    count: int

    def interval(self, confidence: float) -> tuple[float, float] | None:
        """The t-interval of the mean, or None for a single run."""
        if self.error is None:
            return None
        half = float(stats.t.ppf(0.5 + confidence / 2, self.count - 1)) * self.error
        return self.mean - half, self.mean + half


@dataclass(frozen=True)
class Difference:
    """Mean difference of two conditions, its standard error, and the two-sided p-value of no difference.

    `paired`: over the seeds that both conditions have; else Welch's test. `error`, `freedom` and `p` are None where
    they do not exist: fewer than two runs on a side (two pairs), or no spread at all.
    """

    mean: float
    error: float | None
    freedom: float | None
    p: float | None
    paired: bool
    counts: tuple[int, int]


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error of independent values."""
    count = len(values)
    error = float(np.std(values, ddof=1) / np.sqrt(count)) if count > 1 else None
    return Estimate(float(np.mean(values)), error, count)


def difference(left: Sequence[tuple[object, float]], right: Sequence[tuple[object, float]]) -> Difference:
    """Left minus right, each a sequence of (seed, value).

    Paired by seed where both sides have the same seeds, each once and none unknown (None); otherwise Welch's test.
    """
    left_values, right_values = [value for _, value in left], [value for _, value in right]
    by_seed = dict(right)
    seeds = [seed for seed, _ in left]
    paired = None not in seeds and len(set(seeds)) == len(left) == len(right) and set(seeds) == set(by_seed)
    counts = len(left), len(right)
    if paired:
        each = estimate([value - by_seed[seed] for seed, value in left])
        mean, error, freedom = each.mean, each.error, None if each.error is None else float(each.count - 1)
    else:
        mean = float(np.mean(left_values) - np.mean(right_values))
        error, freedom = _welch(left_values, right_values) if min(counts) > 1 else (None, None)
    if error is None or freedom is None:
        return Difference(mean, error, None, None, paired, counts)
    # Without any spread a t statistic does not exist; rounding alone must not make one of 10¹⁵.
    if error <= 1e-12 * max(map(abs, [*left_values, *right_values])):
        return Difference(mean, 0.0, None, None, paired, counts)
    p = float(2 * stats.t.sf(abs(mean) / error, freedom))
    return Difference(mean, error, freedom, p, paired, counts)


def holm(p_values: Mapping[object, float | None]) -> dict[object, float]:
    """Holm's step-down correction over a family; entries without a p-value are not part of it."""
    known = sorted((p, str(key), key) for key, p in p_values.items() if p is not None)
    corrected: dict[object, float] = {}
    largest = 0.0
    for rank, (p, _, key) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        corrected[key] = largest
    return corrected


def _welch(left: Sequence[float], right: Sequence[float]) -> tuple[float, float | None]:
    """Standard error of the difference of two independent means, and Welch and Satterthwaite's degrees of freedom."""
    a, b = (np.var(values, ddof=1) / len(values) for values in (left, right))
    if a + b == 0:
        return 0.0, None
    return float(np.sqrt(a + b)), float((a + b) ** 2 / (a**2 / (len(left) - 1) + b**2 / (len(right) - 1)))
