"""The weight λ of the SAS term as a function of completed updates: piecewise constant or linear stages."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """λ on completed updates `start ≤ s < end` (`end` None: for ever).

    Constant `value`, or, with `end_value`, linear from `value` at `start` to `end_value` at `end`.
    """

    start: int
    value: float
    end: int | None = None
    end_value: float | None = None


def check_stages(stages: Sequence[Stage]) -> list[str]:
    """What is wrong with a schedule, one phrase per fault; empty when it is sound."""
    faults = []
    for index, stage in enumerate(stages):
        if stage.start < 0:
            faults.append(f"stage {index}: start is {stage.start}; it must not be negative")
        if stage.end is not None and stage.end <= stage.start:
            faults.append(f"stage {index}: end {stage.end} is not after start {stage.start}")
        if stage.end is None and stage.end_value is not None:
            faults.append(f"stage {index}: a linear stage (end_value) needs an end")
    ordered = sorted(range(len(stages)), key=lambda i: stages[i].start)
    for first, second in itertools.combinations(ordered, 2):
        end = stages[first].end
        if end is None or end > stages[second].start:
            reach = "for ever" if end is None else f"until {end}"
            faults.append(
                f"stages {first} and {second} overlap: stage {first} lasts {reach}, stage {second} starts at "
                f"{stages[second].start}"
            )
    return faults


def sas_weight(stages: Sequence[Stage], step: int) -> float:
    """λ for the update that follows `step` completed updates; 0 outside every stage."""
    for stage in stages:
        if stage.start <= step and (stage.end is None or step < stage.end):
            if stage.end_value is None or stage.end is None:
                return stage.value
            fraction = (step - stage.start) / (stage.end - stage.start)
            return stage.value + (stage.end_value - stage.value) * fraction
    return 0.0


def describe_stages(stages: Sequence[Stage]) -> str:
    """λ in words, "0" where it is 0 throughout."""
    parts = []
    for stage in sorted(stages, key=lambda stage: stage.start):
        value = f"{stage.value:g}" if stage.end_value is None else f"{stage.value:g} to {stage.end_value:g}"
        value = value.replace("-", "−")
        if stage.end is not None:
            parts.append(f"{value} in steps {stage.start} to {stage.end}")
        else:
            parts.append(value if stage.start == 0 else f"{value} from step {stage.start}")
    if parts and max(stages, key=lambda stage: stage.start).end is not None:
        parts.append("then 0")
    return ", ".join(parts) or "0"


def plateau(stages: Sequence[Stage], steps: int) -> tuple[float, int] | None:
    """(λ, step) where λ is constant from the start until `step` and 0 from then on, in a run of `steps` updates.

    `step` is `steps` where it never becomes 0, and where it is 0 throughout. None for any other schedule.
    """
    knots = {knot for stage in stages for knot in (stage.start, stage.end) if knot is not None and knot < steps}
    ordered = sorted(knots | {0})
    weights = [sas_weight(stages, step) for step in ordered]
    slopes = [s for s in stages if s.end_value not in (None, s.value) and s.start < steps]
    changes = [i for i in range(1, len(weights)) if weights[i] != weights[i - 1]]
    if slopes or len(changes) > 1 or (changes and weights[-1] != 0):
        return None
    return weights[0], ordered[changes[0]] if changes else steps


def role(stages: Sequence[Stage], steps: int, heads: str | None) -> str:
    """What a run of `steps` updates is in an experiment: `base` (λ = 0), `control` (other `heads` than the parses'),
    `suppress` (λ > 0 throughout), `promote` (λ < 0 throughout), `release` (λ > 0 until a step, then 0) or `other`."""
    found = plateau(stages, steps)
    if found is not None and found[0] == 0:
        return "base"
    if heads is not None:
        return "control"
    if found is None:
        return "other"
    weight, until = found
    if until == steps:
        return "suppress" if weight > 0 else "promote"
    return "release" if weight > 0 else "other"
