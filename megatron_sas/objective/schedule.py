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
