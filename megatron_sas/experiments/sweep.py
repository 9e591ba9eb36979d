"""Sweeps: the conditions of an experiment × seeds, each a training run of its own (docs/experiments.md)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sas.config import Config, load_config
from megatron_sas.core.cli import InputError
from megatron_sas.core.files import write_json_atomic
from megatron_sas.core.yaml_file import read_yaml
from megatron_sas.objective.terms import TERMS, syntactic_first
from megatron_sas.optim.schedules import plateau, role
from megatron_sas.run.directory import RunDirectory, steps_in
from megatron_sas.run.records import last_records
from megatron_sas.train.resume import check_same_experiment

SWEEP = "sweep.json"
FORMAT, VERSION = "megatron_sas sweep", 1
FIELDS = {"title", "config", "seeds", "conditions"}
OWN_FIELDS = ("run.output_dir", "run.seed")  # the sweep sets them
BRANCH = "run.branch_from"


@dataclass(frozen=True)
class PlannedRun:
    """One run: its directory, its command line after `--config FILE`, and what it comes to."""

    condition: str
    seed: int
    directory: Path
    arguments: tuple[str, ...]
    config: Config
    parent: Path | None = None  # directory of the run that it branches from

    @property
    def name(self) -> str:
        """CONDITION/seed-N."""
        return f"{self.condition}/{self.directory.name}"

    @property
    def steps_done(self) -> int:
        """Updates on record."""
        return max((record["step"] for record in last_records(RunDirectory(self.directory).records)), default=0)

    @property
    def finished(self) -> bool:
        """Whether the run came to its configured end."""
        return any(
            record.get("event") == "finished" and record["step"] >= self.config.train.steps
            for record in last_records(RunDirectory(self.directory).records)
        )


@dataclass(frozen=True)
class Sweep:
    """All runs of an experiment, in the order in which they should be made: seed by seed, parents before branches."""

    title: str
    config_path: Path
    runs: tuple[PlannedRun, ...]

    def write(self, directory: Path) -> None:
        """Write `sweep.json`, from which the analysis knows which runs belong together."""
        entries = []
        for run in self.runs:
            where = str(run.directory.relative_to(directory))
            entries.append({"directory": where, "condition": run.condition, "seed": run.seed, **describe(run.config)})
        content = {"format": FORMAT, "version": VERSION, "title": self.title, "runs": entries}
        write_json_atomic(directory / SWEEP, content)


def plan_sweep(path: Path, directory: Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read a sweep file and check the configuration of every run.

    Args:
        path: the sweep file.
        directory: where its runs live.
        overrides: `--section.field value` for all runs; a condition's own fields come after them.

    Raises:
        InputError: with every fault found; or a run there was begun with another configuration than it has now.
    """
    values = read_yaml(path)
    faults = [f"{name}: unknown field; known: {', '.join(sorted(FIELDS))}" for name in sorted(set(values) - FIELDS)]
    seeds, conditions = values.get("seeds"), values.get("conditions")
    if not isinstance(seeds, list) or not seeds or not all(type(s) is int for s in seeds) or len({*seeds}) < len(seeds):
        faults.append("seeds: must be a list of different whole numbers, as in [1, 2, 3]")
    if not isinstance(conditions, dict) or not conditions:
        faults.append("conditions: must be a mapping from names to the fields that differ")
    if not isinstance(values.get("config"), str):
        faults.append("config: must name the YAML configuration that all runs share")
    if faults:
        raise InputError(_listed(path, faults))
    config_path = path.parent / values["config"]
    runs: list[PlannedRun] = []
    for seed in seeds:
        planned: dict[str, PlannedRun] = {}
        for condition, fields in conditions.items():
            try:
                planned[condition] = _plan_run(
                    str(condition), fields or {}, seed, config_path, directory, overrides, planned
                )
            except InputError as error:
                faults.append(f"conditions.{condition}: {error}")
        if faults:  # those of the other seeds are the same
            raise InputError(_listed(path, faults))
        runs += planned.values()
    for run in runs:
        _check_same_run(run)
    return Sweep(str(values.get("title") or path.stem), config_path, tuple(runs))


def _plan_run(
    condition: str,
    fields: dict[str, Any],
    seed: int,
    config_path: Path,
    directory: Path,
    overrides: Sequence[str],
    others: dict[str, PlannedRun],
) -> PlannedRun:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", condition):
        raise InputError("the name becomes a directory: use letters, digits, and . _ + -")
    if not isinstance(fields, dict):
        raise InputError("must be a mapping from section.field to a value")
    taken = [name for name in OWN_FIELDS if name in fields or any(o.split("=")[0] == f"--{name}" for o in overrides)]
    if taken:
        raise InputError(f"{taken[0]}: the sweep sets this itself; remove it")
    run_dir = directory / condition / f"seed-{seed}"
    fields, parent = dict(fields), None
    if BRANCH in fields:
        parent, step = _parent(str(fields[BRANCH]), others)
        fields[BRANCH] = str(RunDirectory(parent.directory).checkpoint(step))
    arguments = (
        *overrides,
        *(f"--{name}={json.dumps(value)}" for name, value in fields.items()),
        f"--run.output_dir={run_dir}",
        f"--run.seed={seed}",
    )
    config = load_config(config_path, arguments)
    return PlannedRun(condition, seed, run_dir, arguments, config, parent and parent.directory)


def _check_same_run(run: PlannedRun) -> None:
    """Refuse a run that has a checkpoint or was finished as something else: the trainer's rule for continuing it.

    A finished one would otherwise count as done, and be taken by the analysis for what the sweep file now says it is.
    """
    place = RunDirectory(run.directory)
    saved = place.config
    finished = [r["step"] for r in last_records(place.records) if r.get("event") == "finished"]
    if not saved.is_file() or not (finished or steps_in(place.checkpoints)):
        return  # a run without a checkpoint starts anew
    old, new = load_config(saved), run.config
    # CONDITION/seed-N/checkpoints/step_N of this sweep, which may have moved as a whole.
    before, now = (Path(config.run.branch_from or "").parts[-4:] for config in (old, new))
    if before and before == now:
        new = new.model_copy(update={"run": new.run.model_copy(update={"branch_from": old.run.branch_from})})
    check_same_experiment(old, new, saved)
    if finished and _data_names(old) != _data_names(new):  # nothing will compare their contents
        raise InputError(
            f"{saved}: the run there finished with other values of data.train or data.validation; restore them or "
            "choose another --output"
        )
    if finished and max(finished) > new.train.steps:
        raise InputError(
            f"{saved}: the run there finished after {max(finished)} updates, train.steps is now {new.train.steps}; "
            "restore it or choose another --output"
        )


def _data_names(config: Config) -> tuple[list[tuple[str, float | None]], str | None]:
    """Training data with their weights, and validation data, by name: a job may have them in a directory of its own."""
    validation = config.data.validation
    return [(Path(p).name, weight) for p, weight in config.data.parts()], validation and Path(validation).name


def _parent(text: str, others: dict[str, PlannedRun]) -> tuple[PlannedRun, int]:
    """The run and step that `CONDITION@STEP` names; the run must be planned already and keep a checkpoint there."""
    condition, _, step = text.partition("@")
    if condition not in others or not step.isdecimal():
        raise InputError(f"{BRANCH}: {text!r} is not CONDITION@STEP with a condition that stands above this one")
    parent = others[condition]
    checkpoint = parent.config.checkpoint
    if not checkpoint.due(int(step), parent.config.train.steps):
        raise InputError(f"{BRANCH}: {condition} writes no checkpoint at step {step}; add it to checkpoint.at")
    if checkpoint.kept is not None and int(step) < parent.config.train.steps:
        remedy = "name it in checkpoint.at" if checkpoint.keep_last is None else "leave checkpoint.keep_last out"
        raise InputError(f"{BRANCH}: {condition} may have removed that checkpoint; {remedy}")
    return parent, int(step)


def describe(config: Config) -> dict[str, Any]:
    """What a run is to the analysis: `role` (see `schedule.role`), and `release_step` or None."""
    steps = config.train.steps
    schedule, others = syntactic_first({name: getattr(config, name).schedule for name in TERMS})
    kind = role(schedule, others, steps=steps, heads=config.data.heads)
    step = plateau(schedule, steps)[1] if kind == "release" else None
    return {"role": kind, "release_step": step}


def _listed(path: Path, faults: list[str]) -> str:
    return f"{path}: {faults[0]}" if len(faults) == 1 else f"{path}: {len(faults)} faults:\n  " + "\n  ".join(faults)
