"""Means over seeds, differences between conditions, and the correction of p-values for many of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

Interval = tuple[float, float]
NOT_MEASURED = "–"


@dataclass(frozen=True)
class Estimate:
    """Mean over runs and its standard error (None for a single run)."""

    mean: float
    error: float | None
    count: int

    def interval(self, confidence: float) -> Interval | None:
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
    by_seed, seeds = dict(right), {seed for seed, _ in left}
    paired = None not in seeds and len(seeds) == len(left) == len(right) and seeds == by_seed.keys()
    counts = len(left), len(right)
    if paired:
        each = estimate([value - by_seed[seed] for seed, value in left])
        mean, error, freedom = each.mean, each.error, float(each.count - 1)
    else:
        mean = float(np.mean(left_values) - np.mean(right_values))
        error, freedom = _welch(left_values, right_values) if min(counts) > 1 else (None, None)
    if error is None:
        return Difference(mean, None, None, None, paired, counts)
    # Without any spread a t statistic does not exist; rounding alone must not make one of 10¹⁵.
    if error <= 1e-12 * max(map(abs, [*left_values, *right_values])):
        return Difference(mean, 0.0, None, None, paired, counts)
    return Difference(mean, error, freedom, two_sided_p(mean / error, freedom), paired, counts)


def two_sided_p(t: float, freedom: float) -> float:
    """The p-value of a t statistic."""
    return float(2 * stats.t.sf(abs(t), freedom))


def holm(p_values: Mapping[object, float | None]) -> dict[object, float]:
    """Holm's step-down correction over a family; entries without a p-value are not part of it."""
    known = sorted((p, str(key), key) for key, p in p_values.items() if p is not None)
    scaled = [min(1.0, (len(known) - rank) * p) for rank, (p, _, _) in enumerate(known)]
    corrected = np.maximum.accumulate(scaled).tolist() if known else []
    return {key: p for (_, _, key), p in zip(known, corrected, strict=True)}


def show(value: Estimate | Difference | None, digits: int = 3, *, signed: bool = False) -> str:
    """The mean with its standard error, where there is one."""
    if value is None:
        return NOT_MEASURED
    sign = "+" if signed else ""
    error = "" if value.error is None else f" ± {value.error:.{digits}f}"
    return true_minus(f"{value.mean:{sign}.{digits}f}{error}")


def show_interval(interval: Interval | None, form: str = ".0f") -> str:
    """Both ends, formatted by `form`."""
    return NOT_MEASURED if interval is None else true_minus(" to ".join(f"{end:{form}}" for end in interval))


def show_p(p: float) -> str:
    """A p-value with its relation sign."""
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def true_minus(text: str) -> str:
    """Text with minus signs in place of hyphens, for numbers."""
    return text.replace("-", "−")


def _welch(left: Sequence[float], right: Sequence[float]) -> tuple[float, float | None]:
    """Standard error of the difference of two independent means, and Welch and Satterthwaite's degrees of freedom."""
    a, b = (np.var(values, ddof=1) / len(values) for values in (left, right))
    if a + b == 0:
        return 0.0, None
    return float(np.sqrt(a + b)), float((a + b) ** 2 / (a**2 / (len(left) - 1) + b**2 / (len(right) - 1)))
