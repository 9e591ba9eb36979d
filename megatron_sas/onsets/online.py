"""Onsets while they happen: the definition of `offline.break_point`, from what is known so far."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field

from megatron_sas.core.settings import Section
from megatron_sas.evaluation.registry import live_metrics
from megatron_sas.onsets.offline import largest_by_chance, noise_level

BLOCKS_PER_WINDOW = 4  # the curve is averaged over blocks of Δ/4
MIN_BLOCKS = 12  # three windows: with less, neither noise nor usual bends can be told
TYPICAL_FACTOR = 3.0  # a bend three times as strong as bends usually are

_evaluated = {metric.key: ("evaluation", metric.key, metric.direction) for metric in live_metrics() if metric.watched}
WATCHED = {**_evaluated, "loss": ("train", "mlm_loss", -1)}
"""Kind of record, name of the value, and direction of the onset, of every curve that can be watched."""


class WatchSection(Section):
    """Detection of onsets while they happen, with dense snapshots around them (docs/branching.md); default: off."""

    metrics: tuple[Literal[tuple(WATCHED)], ...] = Field(
        (), description=f"curves to watch: {', '.join(_evaluated)} (live evaluation), loss (masked-LM loss in training)"
    )
    delta: int | None = Field(None, description="Δ, steps over which an onset is a bend", ge=4)
    start: int = Field(0, description="step from which the curves count: after the loss's first fall", ge=0)
    every: int | None = Field(None, description="steps between snapshots; default: a quarter of delta", ge=1)
    keep: int = Field(12, description="snapshots in the ring, kept when an onset is detected", ge=1)
    after: int | None = Field(None, description="steps of snapshots after the detection; default: 4 delta", ge=0)

    @property
    def interval(self) -> int:
        """Steps between snapshots."""
        return self.every or self.delta // 4

    @property
    def reach_after(self) -> int:
        """Steps after a detection whose snapshots are kept."""
        return 4 * self.delta if self.after is None else self.after

    @property
    def most_snapshots(self) -> int:
        """How many there can be at most: the ring, what a restart would need, and those that are kept."""
        if not self.metrics:
            return 0
        return 3 * self.keep + len(self.metrics) * (self.keep + self.reach_after // self.interval + 1)

    def due(self, step: int) -> bool:
        """Whether the ring takes a snapshot after `step` updates."""
        return bool(self.metrics) and step >= self.start and step % self.interval == 0

    def faults(self) -> list[str]:
        """A watch needs its Δ, and a ring that reaches back over both windows of the bend."""
        if self.metrics and self.delta is None:
            return ["delta: is required when metrics are watched"]
        if self.metrics and self.keep * self.interval < 2 * self.delta:
            return [
                f"keep: {self.keep} snapshots, one every {self.interval} steps, reach back less than twice delta "
                f"{self.delta}, where an onset is seen; keep more"
            ]
        return []


@dataclass(frozen=True)
class Detection:
    """A bend that noise does not explain: `strength` exceeds `threshold`, both in the curve's units."""

    strength: float
    threshold: float


class OnsetDetector:
    """Watches one curve, point by point.

    With f the curve in blocks of Δ/4 (linear between their middles) and T the middle of the newest, the bend is that at
    t = T - Δ: [f(t+Δ) - f(t)] - [f(t) - f(t-Δ)]. It is an onset when

    - it exceeds what noise alone would give as the largest of so many (as in `break_point`), and three times the
      standard deviation of this curve's bends so far (from their median), for curves that wander or curve;
    - the rise at least doubles: f(t+Δ) - f(t) > 2·[f(t) - f(t-Δ)], which smooth growth does not do within Δ;
    - it leads beyond everything before t, which the recovery from a dip does not.
    """

    def __init__(self, delta: int, sign: int = 1, start: int = 0) -> None:
        """`delta`: Δ in steps. `sign` -1: look for a fall. `start`: earlier points are left out."""
        self.delta, self.sign, self.start = delta, sign, start
        self._block = 0  # number of the block that is being filled
        self._points: list[tuple[float, float]] = []  # in it
        self._steps: list[float] = []  # means of the finished blocks
        self._values: list[float] = []
        self._leads: list[float] = []  # the largest value up to each

    def add(self, step: int, value: float | None) -> Detection | None:
        """Take the next point, steps rising; what is not finite is left out. Decides at the end of each block."""
        if step <= self.start or value is None or not math.isfinite(value):
            return None
        block = math.ceil((step - self.start) * BLOCKS_PER_WINDOW / self.delta)
        detection = self._finish_block() if block > self._block else None
        self._block = block
        self._points.append((step, self.sign * value))
        if (step - self.start) * BLOCKS_PER_WINDOW == block * self.delta:  # its last step
            detection = self._finish_block() or detection
        return detection

    def _finish_block(self) -> Detection | None:
        if not self._points:
            return None
        step, value = np.mean(self._points, axis=0)
        self._steps.append(step)
        self._values.append(value)
        self._leads.append(max(value, self._leads[-1]) if self._leads else value)
        self._points = []
        return self._decide() if len(self._steps) >= MIN_BLOCKS and self._leads_and_doubles() else None

    def _leads_and_doubles(self) -> bool:
        """Whether the newest bend meets the conditions that need no look at all of the past, which few do."""
        last = self._steps[-1]
        if last - 2 * self.delta < self._steps[0] - 1e-9:
            return False
        near = slice(max(0, bisect_right(self._steps, last - 2 * self.delta) - 1), None)
        shifts = np.array([2, 1, 0]) * self.delta
        before, middle, after = np.interp(last - shifts, self._steps[near], self._values[near])
        leads = after > self._leads[bisect_right(self._steps, last - self.delta) - 1]
        return leads and after - 2 * middle + before > middle - before

    def _decide(self) -> Detection | None:
        s, f = np.array(self._steps), np.array(self._values)
        middles = s[s - 2 * self.delta >= s[0] - 1e-9] - self.delta
        if len(middles) < 2:
            return None
        before, middle, after = (np.interp(middles + shift, s, f) for shift in (-self.delta, 0, self.delta))
        strengths = after - 2 * middle + before
        threshold = max(
            largest_by_chance(noise_level(s, f), len(s)),
            TYPICAL_FACTOR * 1.4826 * float(np.median(np.abs(strengths[:-1]))),
        )
        return Detection(float(strengths[-1]), threshold) if strengths[-1] > threshold else None
