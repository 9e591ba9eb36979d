"""Runs as curves over training steps, and conditions as groups of runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from megatron_sas.core.cli import InputError
from megatron_sas.evaluation.base import Metric
from megatron_sas.evaluation.minimal_pairs import BLIMP
from megatron_sas.evaluation.registry import live_metrics
from megatron_sas.evaluation.uas import BASELINE, RELATIONS, UAS
from megatron_sas.evaluation.validation import LOSS
from megatron_sas.glue.tasks import GLUE
from megatron_sas.objective.terms import TERMS, syntactic_first
from megatron_sas.optim.schedules import Schedule, is_zero, plateau, read_schedule, role
from megatron_sas.run.directory import CONFIG

PAPER_ORDER = (LOSS, GLUE, BLIMP, UAS)
ROLES = ("base", "suppress", "promote", "release", "control", "other")
METRICS = tuple(metric for metric in live_metrics() if metric.title)
"""The curves that have onsets."""
TABLE_METRICS = (*PAPER_ORDER, *(metric for metric in METRICS if metric not in PAPER_ORDER))


@dataclass(frozen=True)
class Curve:
    """Finite values over rising steps, both float64 of one length."""

    steps: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, points: Sequence[tuple[float, float]]) -> Curve:
        """The curve through (step, value)."""
        return cls(*np.ascontiguousarray(np.array(points, np.float64).reshape(-1, 2).T))

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True)
class Measured:
    """What was measured after training: of a run's snapshots (trajectory) and of its final model (GLUE).

    `records` are shaped like evaluation lines. `head_counts` are per step int64 (R, 2, L, H), the edges that each head
    got right, of `relations`, with `edge_counts` (R,). `item_steps` have results per edge and pair in
    `directory` (`trajectory/points.py`). `glue` has the means of those tasks that are averaged.
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    relations: tuple[str, ...] = ()
    edge_counts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    head_counts: dict[int, np.ndarray] = field(default_factory=dict)
    directory: Path | None = None
    item_steps: tuple[int, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    glue: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One training run: its configuration and its records by kind, in order of steps.

    `assigned_role`, `assigned_seed` and `assigned_release` are a sweep's, None where the configuration has to tell.
    `item_metrics` names the metrics whose curves were measured item by item, so that items can be resampled.
    `training_loss`: the loss is that of training, averaged between evaluations, since there is none on held-out text.
    """

    path: Path
    label: str
    config: dict[str, Any]
    train: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    events: list[dict[str, Any]]
    assigned_role: str | None = None
    assigned_seed: int | None = None
    assigned_release: int | None = None
    measured: Measured = field(default_factory=Measured)
    item_metrics: frozenset[str] = frozenset()
    training_loss: bool = False

    @property
    def name(self) -> str:
        """The run directory's own name."""
        return self.path.name

    @property
    def title(self) -> str:
        """The condition with the directory's name."""
        return f"{self.label} ({self.name})"

    @property
    def final_step(self) -> int:
        """The last step of which anything was recorded."""
        return max(record["step"] for record in self.train + self.evaluations + self.measured.records)

    def curve(self, key: str, kind: str = "evaluation") -> Curve:
        """Values of `key` over the steps that have one (the last line of a step counts); empty when none has."""
        records = self.evaluations if kind == "evaluation" else self.train
        points = {record["step"]: record.get(key) for record in records}
        return Curve.of([(step, value) for step, value in sorted(points.items()) if _is_finite_number(value)])

    def metric(self, metric: Metric) -> Curve:
        """The curve of a `Metric`."""
        if metric != LOSS or not self.training_loss:
            return self.curve(metric.key)
        train = self.curve("mlm_loss", "train")
        groups = np.searchsorted([record["step"] for record in self.evaluations], train.steps)
        members = [groups == group for group in np.unique(groups)]
        return Curve.of([(train.steps[those].mean(), train.values[those].mean()) for those in members])

    @cached_property
    def schedules(self) -> dict[str, Schedule]:
        """λ of every term by completed updates, from the configuration."""
        schedules = {}
        for name in TERMS:
            try:
                schedules[name] = read_schedule(self.setting(f"{name}.schedule") or 0)
            except ValidationError:
                raise InputError(
                    f"{self.path / CONFIG}: {name}.schedule is not a list of stages or another schedule; restore the "
                    "trainer's own file"
                ) from None
        return schedules

    @property
    def schedule(self) -> Schedule:
        """λ of the term along dependency heads."""
        return syntactic_first(self.schedules)[0]

    @property
    def other_terms(self) -> list[str]:
        """The further terms whose λ is not 0 throughout."""
        others = syntactic_first({name: name for name in TERMS})[1]
        return [name for name in others if not is_zero(self.schedules[name], self.length)]

    @property
    def planned_steps(self) -> int | None:
        """The length that the configuration asks for."""
        steps = self.setting("train.steps")
        return steps if isinstance(steps, int) else None

    @property
    def length(self) -> int:
        """The planned steps, or those done where no length is known."""
        return self.planned_steps or self.final_step

    @property
    def seed(self) -> int | None:
        """The seed, by which runs of different conditions are paired."""
        return self.setting("run.seed") if self.assigned_seed is None else self.assigned_seed

    def final(self, metric: Metric) -> float | None:
        """The last value of a metric; of GLUE the mean over its tasks."""
        if metric is GLUE:
            return float(np.mean(list(self.measured.glue.values()))) if self.measured.glue else None
        values = self.metric(metric).values
        return float(values[-1]) if len(values) else None

    @property
    def plateau(self) -> tuple[float, int] | None:
        """(λ, step) where λ is constant from the start until that step and 0 from then on, else None."""
        return None if self.other_terms else plateau(self.schedule, self.length)

    @property
    def constant_weight(self) -> float | None:
        """λ where it is the same at every step, else None."""
        weight, until = self.plateau or (None, None)
        return weight if until == self.length else None

    @property
    def role(self) -> str:
        """One of `ROLES`: the sweep's, or what the configuration amounts to."""
        if self.assigned_role is not None:
            return self.assigned_role
        return role(*syntactic_first(self.schedules), steps=self.length, heads=self.setting("data.heads"))

    @property
    def release_step(self) -> int | None:
        """When a run of role "release" lets λ go."""
        if self.assigned_release is not None or self.plateau is None or self.constant_weight is not None:
            return self.assigned_release
        return self.plateau[1]

    @property
    def is_base(self) -> bool:
        """Whether this is what others are compared with: λ is 0 throughout, unless a sweep gives it another role."""
        return self.role == "base"

    def weight(self, term: str) -> Curve:
        """λ of a term over the steps of the run, fine enough to show where stages begin and end."""
        schedule = self.schedules[term]
        edges = schedule.knots()
        grid = np.linspace(0, self.final_step, 200).astype(int).tolist()
        steps = sorted(s for s in {*grid, *edges, *(edge - 1 for edge in edges)} if 0 <= s <= self.final_step)
        return Curve.of([(step, schedule(step)) for step in steps])

    def describe_schedule(self) -> str:
        """λ in words, with the names of further terms."""
        others = [f"{name} {self.schedules[name].describe()}" for name in self.other_terms]
        own = self.schedule.describe()
        return "; ".join(others if own == "0" and others else [own, *others])

    def nested(self, key: str, *, first: bool = False) -> dict[str, Any]:
        """The dictionary `key` of the last evaluation that has it (`first`: of step 0); {} when there is none."""
        records = [r for r in self.evaluations if isinstance(r.get(key), dict) and (r["step"] == 0 or not first)]
        return records[-1][key] if records else {}

    @property
    def uas_baseline(self) -> float | None:
        """UAS of the best fixed offset per relation: as recorded, or from the recorded relations, weighted by edges."""
        recorded = self.curve(BASELINE.key)
        if len(recorded):
            return float(recorded.values[-1])
        relations = [r for r in self.nested(RELATIONS.key).values() if "baseline" in r and r.get("count")]
        if not relations:
            return None
        return float(np.average([r["baseline"] for r in relations], weights=[r["count"] for r in relations]))

    def setting(self, path: str) -> Any:
        """The configuration's value at `section.field`, or None."""
        section, field = path.split(".")
        values = self.config.get(section)
        return values.get(field) if isinstance(values, dict) else None


def group_by_condition(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by label, conditions of the base (λ = 0) first, otherwise in the order given."""
    groups: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: not run.is_base):
        groups.setdefault(run.label, []).append(run)
    mixed = [label for label, group in groups.items() if len({run.is_base for run in group}) > 1]
    if mixed:
        raise InputError(
            f"--labels: {mixed[0]!r} stands for runs with and without a SAS term; give them different labels"
        )
    return groups


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
