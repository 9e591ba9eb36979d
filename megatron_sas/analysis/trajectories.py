"""Runs as curves over training steps, read from their directories."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_sas.cli import InputError
from megatron_sas.metrics.records import FILE_NAME, read_records
from megatron_sas.objective.schedule import Stage, sas_weight

CONFIG_NAME = "config.yaml"


@dataclass(frozen=True)
class Metric:
    """A curve that the analysis knows: `sign` is the direction of its onset and of improvement."""

    name: str  # in the outputs
    key: str  # in the evaluation lines
    title: str
    sign: int


METRICS = (
    Metric("loss", "validation_mlm_loss", "MLM loss", -1),
    Metric("uas", "uas", "UAS", 1),
    Metric("blimp", "blimp", "BLiMP", 1),
)


@dataclass(frozen=True)
class Curve:
    """Finite values over rising steps, both float64 of one length."""

    steps: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True)
class Run:
    """One training run: its configuration and its records by kind, in order of steps."""

    path: Path
    label: str
    config: dict[str, Any]
    train: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    events: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """The run directory's own name."""
        return self.path.name

    @property
    def final_step(self) -> int:
        """The last step of which anything was recorded."""
        return max(record["step"] for record in self.train + self.evaluations)

    def curve(self, key: str, kind: str = "evaluation") -> Curve:
        """Values of `key` over the steps that have one (the last line of a step counts); empty when none has."""
        records = self.evaluations if kind == "evaluation" else self.train
        points = {record["step"]: record.get(key) for record in records}
        points = {step: value for step, value in sorted(points.items()) if _is_finite_number(value)}
        return Curve(np.array(list(points), np.float64), np.array(list(points.values()), np.float64))

    def metric(self, metric: Metric) -> Curve:
        """The curve of a `Metric`; where no validation loss exists, the training loss averaged between evaluations."""
        curve = self.curve(metric.key)
        if len(curve) or metric.name != "loss":
            return curve
        train = self.curve("mlm_loss", "train")
        groups = np.searchsorted([record["step"] for record in self.evaluations], train.steps)
        means = [(train.steps[groups == g].mean(), train.values[groups == g].mean()) for g in np.unique(groups)]
        return Curve(*np.array(means, np.float64).reshape(-1, 2).T)

    @cached_property
    def schedule(self) -> tuple[Stage, ...]:
        """Stages of λ, from the configuration; empty when the SAS term is off."""
        stages = self.setting("sas.schedule") or ()
        try:
            return tuple(Stage(**stage) for stage in stages)
        except TypeError:
            raise InputError(
                f"{self.path / CONFIG_NAME}: sas.schedule is not a list of stages; restore the trainer's own file"
            ) from None

    @property
    def is_base(self) -> bool:
        """Whether λ is 0 throughout."""
        return not any(stage.value or stage.end_value for stage in self.schedule)

    @property
    def weight(self) -> Curve:
        """λ over the steps of the run, fine enough to show where stages begin and end."""
        edges = {edge for stage in self.schedule for edge in (stage.start, stage.end) if edge is not None}
        grid = np.linspace(0, self.final_step, 200).astype(int).tolist()
        steps = sorted(s for s in {*grid, *edges, *(edge - 1 for edge in edges)} if 0 <= s <= self.final_step)
        return Curve(np.array(steps, np.float64), np.array([sas_weight(self.schedule, s) for s in steps], np.float64))

    def describe_schedule(self) -> str:
        """λ in words."""
        parts = []
        for stage in sorted(self.schedule, key=lambda stage: stage.start):
            value = f"{stage.value:g}" if stage.end_value is None else f"{stage.value:g} to {stage.end_value:g}"
            value = value.replace("-", "−")
            if stage.end is not None:
                parts.append(f"{value} in steps {stage.start} to {stage.end}")
            else:
                parts.append(value if stage.start == 0 else f"{value} from step {stage.start}")
        if parts and self.schedule[-1].end is not None:
            parts.append("then 0")
        return ", ".join(parts) or "0"

    def nested(self, key: str, *, first: bool = False) -> dict[str, Any]:
        """The dictionary `key` of the last evaluation that has it (`first`: of step 0); {} when there is none."""
        records = [record for record in self.evaluations if isinstance(record.get(key), dict)]
        if first:
            records = [record for record in records if record["step"] == 0]
        return records[-1][key] if records else {}

    @property
    def uas_baseline(self) -> float | None:
        """UAS of the best fixed offset per relation: as recorded, or from the recorded relations, weighted by edges."""
        recorded = self.curve("uas_baseline")
        if len(recorded):
            return float(recorded.values[-1])
        relations = [r for r in self.nested("uas_relations").values() if "baseline" in r and r.get("count")]
        if not relations:
            return None
        return float(np.average([r["baseline"] for r in relations], weights=[r["count"] for r in relations]))

    def setting(self, path: str) -> Any:
        """The configuration's value at `section.field`, or None."""
        section, field = path.split(".")
        values = self.config.get(section)
        return values.get(field) if isinstance(values, dict) else None


def load_runs(paths: Sequence[str | Path], labels: Sequence[str] | None = None) -> list[Run]:
    """Read run directories. A label stands for a condition: runs that share one are repetitions of it.

    Labels default to the directories' names. Raises `InputError` for a path that is not a run directory, a broken file,
    a run without evaluations, a path given twice, or labels that do not match the runs in number.
    """
    if labels is not None and len(labels) != len(paths):
        raise InputError(
            f"--labels: {len(labels)} label(s) for {len(paths)} run(s); give one per run, in the same order"
        )
    resolved = [Path(path).resolve() for path in paths]
    for path in resolved:
        if resolved.count(path) > 1:
            raise InputError(f"{path}: given more than once; name each run once")
    labels = labels or [path.name for path in resolved]
    return [load_run(path, label) for path, label in zip(resolved, labels, strict=True)]


def load_run(path: Path, label: str) -> Run:
    """Read one run directory; errors as `load_runs`."""
    if not path.is_dir():
        raise InputError(f"{path}: not a directory; give a run directory that contains {FILE_NAME} and {CONFIG_NAME}")
    records = sorted(read_records(path / FILE_NAME), key=lambda record: record["step"])
    by_kind = {kind: [r for r in records if r["kind"] == kind] for kind in ("train", "evaluation", "event")}
    if not by_kind["evaluation"]:
        raise InputError(f"{path / FILE_NAME}: no evaluations; train with live evaluation switched on")
    config = _read_config(path / CONFIG_NAME)
    return Run(path, label, config, by_kind["train"], by_kind["evaluation"], by_kind["event"])


def conditions(runs: Sequence[Run]) -> dict[str, list[Run]]:
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


def _read_config(path: Path) -> dict[str, Any]:
    """The configuration as plain values: not validated, so that runs of other versions can be compared too."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a run directory as the trainer left it")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        config = None
    if not isinstance(config, dict):
        raise InputError(f"{path}: not a YAML configuration; restore the file that the trainer wrote")
    return config


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
