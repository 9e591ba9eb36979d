"""Schedules: a number by completed updates. The learning rate and every term's weight λ are the same kind of thing.

A schedule is a frozen dataclass that is called with the completed updates. To add one, write it here and add a line to
`SCHEDULES`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal, Protocol, Union

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, RootModel, Tag, TypeAdapter, model_serializer
from pydantic_core import PydanticCustomError

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


class Schedule(Protocol):
    """A number by completed updates."""

    @property
    def end(self) -> int | None:
        """The step from which it is 0 indefinitely; None: there is none."""

    def __call__(self, step: int) -> float:
        """The value for the update that follows `step` completed ones."""

    def faults(self) -> list[str]:
        """What is wrong with it, one phrase per fault."""

    def describe(self) -> str:
        """The values in words, "0" where it is 0 throughout."""

    def course(self) -> str:
        """The same of the learning rate, whose peak is told elsewhere."""

    def knots(self) -> set[int]:
        """Steps at which it changes its course."""


@dataclass(frozen=True)
class Stage:
    """λ on completed updates `start ≤ s < end` (`end` None: indefinitely).

    Constant `value`, or, with `end_value`, linear from `value` at `start` to `end_value` at `end`.
    """

    start: int
    value: float
    end: int | None = None
    end_value: float | None = None
    __pydantic_config__ = STRICT

    def __call__(self, step: int) -> float:
        """The value at a step of the stage."""
        if self.end_value is None or self.end is None:
            return self.value
        fraction = (step - self.start) / (self.end - self.start)
        return self.value + (self.end_value - self.value) * fraction


class Stages(RootModel[tuple[Stage, ...]]):
    """Piecewise constant or linear, 0 outside every stage. Written as a list; a number is one stage from 0 on."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    @model_serializer
    def _as_list(self) -> list[dict[str, Any]]:
        return [{name: value for name, value in asdict(stage).items() if value is not None} for stage in self.root]

    @property
    def end(self) -> int | None:
        """The end of the last stage, 0 without any."""
        ends = [stage.end for stage in self.root]
        return None if None in ends else max(ends, default=0)

    def __call__(self, step: int) -> float:
        """The value for the update that follows `step` completed ones."""
        for stage in self.root:
            if stage.start <= step and (stage.end is None or step < stage.end):
                return stage(step)
        return 0.0

    def faults(self) -> list[str]:
        """Stages must be well-formed and must not overlap."""
        faults, stages = [], self.root
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

    def describe(self) -> str:
        """The stages in words, "0" where there are none."""
        parts = []
        for stage in sorted(self.root, key=lambda stage: stage.start):
            value = (
                _show(stage.value) if stage.end_value is None else f"{_show(stage.value)} to {_show(stage.end_value)}"
            )
            if stage.end is not None:
                parts.append(f"{value} in steps {stage.start} to {stage.end}")
            else:
                parts.append(value if stage.start == 0 else f"{value} from step {stage.start}")
        if parts and max(self.root, key=lambda stage: stage.start).end is not None:
            parts.append("then 0")
        return ", ".join(parts) or "0"

    def course(self) -> str:
        """The stages in words: they have no peak that is told elsewhere."""
        return self.describe()

    def knots(self) -> set[int]:
        """Where stages begin and end."""
        return {knot for stage in self.root for knot in (stage.start, stage.end) if knot is not None}


@dataclass(frozen=True)
class Linear:
    """Linear warm-up to `value`, then linear decay to 0 at `decay_horizon`.

    The horizon is independent of the length of the run, so that stages and continued runs share one schedule. Equal to
    `transformers.get_linear_schedule_with_warmup(…, warmup_steps, decay_horizon)`.
    """

    value: float
    decay_horizon: Annotated[int, Field(ge=1)]
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    kind: Literal["linear"] = field(default="linear", kw_only=True)
    __pydantic_config__ = STRICT

    @property
    def end(self) -> int | None:
        """Where the decay ends."""
        return self.decay_horizon

    def __call__(self, step: int) -> float:
        """The value for the update that follows `step` completed ones."""
        if step < self.warmup_steps:
            return self.value * step / self.warmup_steps
        return self._after_warmup(step)

    def _after_warmup(self, step: int) -> float:
        return self.value * max(0.0, (self.decay_horizon - step) / (self.decay_horizon - self.warmup_steps))

    def faults(self) -> list[str]:
        """The decay must begin after the warm-up."""
        if self.warmup_steps >= self.decay_horizon:
            return [f"warmup_steps: {self.warmup_steps} is not before decay_horizon {self.decay_horizon}"]
        return []

    def describe(self) -> str:
        """The peak and what the schedule does from there, in words."""
        return f"{_show(self.value)}, {self.course()}" if self.value else "0"

    def course(self) -> str:
        """What it does, without the peak."""
        return f"{self._rise()}, linear decay to 0 at update {self.decay_horizon:,}"

    def _rise(self) -> str:
        return f"linear warm-up over {self.warmup_steps:,} updates"

    def knots(self) -> set[int]:
        """Where warm-up and decay end."""
        return {self.warmup_steps, self.decay_horizon}


@dataclass(frozen=True)
class Cosine(Linear):
    """Linear warm-up to `value`, then half a cosine down to 0 at `decay_horizon`, and 0 from there on.

    After Loshchilov and Hutter, *SGDR* (ICLR 2017, without restarts). Until the horizon equal to
    `transformers.get_cosine_schedule_with_warmup(…, warmup_steps, decay_horizon)`, which rises again after it.
    """

    kind: Literal["cosine"] = field(default="cosine", kw_only=True)

    def _after_warmup(self, step: int) -> float:
        progress = min(1.0, (step - self.warmup_steps) / (self.decay_horizon - self.warmup_steps))
        return self.value * (0.5 * (1.0 + math.cos(math.pi * progress)))

    def course(self) -> str:
        """What it does, without the peak."""
        return f"{self._rise()}, half a cosine down to 0 at update {self.decay_horizon:,}"


@dataclass(frozen=True)
class Wsd(Linear):
    """Warm-up, stable, decay: linear warm-up to `value`, constant, and linear to 0 in the `decay_steps` before
    `decay_horizon`.

    After Hu et al., *MiniCPM* (COLM 2024), with the linear decay of Hägele et al., *Scaling Laws and Compute-Optimal
    Training Beyond Fixed Training Durations* (NeurIPS 2024). Equal to transformers' `get_wsd_schedule` with
    `decay_type="linear"`.
    """

    decay_steps: Annotated[int | None, Field(ge=1)] = None  # None: a tenth of the horizon
    kind: Literal["wsd"] = field(default="wsd", kw_only=True)

    @property
    def decay_start(self) -> int:
        """The first step of the decay."""
        steps = max(1, self.decay_horizon // 10) if self.decay_steps is None else self.decay_steps
        return self.decay_horizon - steps

    def _after_warmup(self, step: int) -> float:
        if step < self.decay_start:
            return self.value
        progress = (step - self.decay_start) / (self.decay_horizon - self.decay_start)
        return self.value * max(0.0, 1.0 - progress)

    def faults(self) -> list[str]:
        """The decay must not begin within the warm-up."""
        if self.warmup_steps < self.decay_horizon and self.decay_start < self.warmup_steps:
            return [f"warmup_steps: {self.warmup_steps} is after the decay begins, at step {self.decay_start}"]
        return super().faults()

    def course(self) -> str:
        """What it does, without the peak."""
        return f"{self._rise()}, constant, linear decay to 0 from update {self.decay_start:,} to {self.decay_horizon:,}"

    def knots(self) -> set[int]:
        """Where warm-up, plateau and decay end."""
        return super().knots() | {self.decay_start}


SCHEDULES = {"stages": Stages, "linear": Linear, "cosine": Cosine, "wsd": Wsd}


MAPPED = tuple(name for name in SCHEDULES if name != "stages")
"""Kinds that are written as mappings; `stages` are a list."""
ANY_KIND = f"{', '.join(MAPPED[:-1])} or {MAPPED[-1]}"


def _as_written(value: Any) -> Any:
    """A number is a constant; a mapping says which kind it is."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return ({"start": 0, "value": float(value)},) if value else ()
    if isinstance(value, dict):
        check_kind(value.get("kind"))
    return value


def check_kind(kind: Any) -> None:
    """Raise `PydanticCustomError` unless `kind` names a schedule that is written as a mapping."""
    if kind not in MAPPED:
        raise PydanticCustomError("schedule_kind", f"should be a list of stages or a kind: {', '.join(MAPPED)}")


def _kind(value: Any) -> str:
    return value["kind"] if isinstance(value, dict) else getattr(value, "kind", "stages")


AnySchedule = Annotated[
    Annotated[
        Union[tuple(Annotated[kind, Tag(name)] for name, kind in SCHEDULES.items())],  # noqa: UP007
        Discriminator(_kind),
    ],
    BeforeValidator(_as_written),
]
"""The type of a field that holds a schedule; faults in it have the kind in their location, after the field."""


def read_schedule(value: Any) -> Schedule:
    """The schedule that a YAML file holds. Raises pydantic's `ValidationError` where it holds none."""
    return _adapter().validate_python(value)


@functools.cache
def _adapter() -> TypeAdapter:
    """Building one takes a hundred times as long as using it."""
    return TypeAdapter(AnySchedule)


def schedule_faults(schedule: Schedule, field: str = "schedule") -> list[str]:
    """The faults of a schedule that is the value of a field, each beginning with the field's name."""
    separator = ": " if isinstance(schedule, Stages) else "."
    return [f"{field}{separator}{fault}" for fault in schedule.faults()]


def largest(schedule: Schedule) -> float:
    """The largest value that a schedule ever has. Between two knots each of them only rises or only falls."""
    steps = {0} | {step for knot in schedule.knots() for step in (knot - 1, knot)}
    return max(schedule(step) for step in steps if step >= 0)


def mean(schedule: Schedule, steps: int) -> float:
    """The mean over the updates of a run, from at most a thousand of them; of a constant itself, to the bit."""
    values = [schedule(step) for step in range(0, steps, math.ceil(steps / 1000))]
    return values[0] if min(values) == max(values) else sum(values) / len(values)


def plateau(schedule: Schedule, steps: int) -> tuple[float, int] | None:
    """(λ, step) where λ is constant from the start until `step` and 0 from then on, in a run of `steps` updates.

    `step` is `steps` where it never becomes 0, and where it is 0 throughout. None for any other schedule.
    """
    if not isinstance(schedule, Stages):
        return None if schedule.value else (0.0, steps)
    ordered = sorted({knot for knot in schedule.knots() if knot < steps} | {0})
    weights = [schedule(step) for step in ordered]
    slopes = [s for s in schedule.root if s.end_value not in (None, s.value) and s.start < steps]
    changes = [i for i in range(1, len(weights)) if weights[i] != weights[i - 1]]
    if slopes or len(changes) > 1 or (changes and weights[-1] != 0):
        return None
    return weights[0], ordered[changes[0]] if changes else steps


def is_zero(schedule: Schedule, steps: int) -> bool:
    """Whether the schedule is 0 throughout a run of `steps` updates."""
    found = plateau(schedule, steps)
    return found is not None and found[0] == 0


def role(schedule: Schedule, others: Iterable[Schedule], *, steps: int, heads: str | None) -> str:
    """What a run of `steps` updates is in an experiment: `base` (every weight is 0), `control` (other `heads` than the
    parses'), `suppress` (λ > 0 throughout), `promote` (λ < 0 throughout), `release` (λ > 0 until a step, then 0) or
    `other`.

    Args:
        schedule: λ of the term along syntactic heads.
        others: the weights of other terms, which make a run `other` where they are not 0.
    """
    found = plateau(schedule, steps)
    if not all(is_zero(other, steps) for other in others):
        return "other"
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


def _show(value: float) -> str:
    return f"{value:g}".replace("-", "−")
