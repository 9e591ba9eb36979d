"""Which models there are over the course of a training run: snapshots and checkpoints, or a folder of models."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sas.core.cli import InputError
from megatron_sas.run.directory import RunDirectory, is_model, steps_in
from megatron_sas.run.reading import load_model, model_step
from megatron_sas.trajectory.step_names import REMEDY, last_number, step_by_pattern, steps_of_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megatron_sas.model.base import MaskedLM


def list_models(
    path: str | Path, step_pattern: str | None = None, report: Callable[[str], None] = lambda line: None
) -> list[tuple[int, Path]]:
    """(step, directory) of every model of a run or in a folder, by rising step.

    Args:
        path: a run directory: its snapshots and checkpoints and, if it is a branch (lineage.json), those of its
            ancestors up to the branch; where a step has both, the snapshot. Or a folder of model directories
            (Hugging Face or checkpoints): the step is what the models record, if all do, or what their names say
            (`steps_of_names`). Or one model: its step is what it records, or the last number in its name, else 0.
        step_pattern: a regular expression whose group is the step in a name of a folder; goes before all else.
        report: gets a line about steps that had to be guessed or moved.

    Raises:
        InputError: there are no models, two have the same step, names leave the order open, the pattern does not fit,
            or the parent of a branched run is not there.
    """
    path = Path(path)
    pattern = None if step_pattern is None else _compile(step_pattern)
    if not path.is_dir():
        raise InputError(f"{path}: no such directory; give a run, or a folder of models")
    if is_model(path):
        return [(_step_of_one(path, pattern), path)]
    is_run = RunDirectory(path).is_run()
    if is_run and pattern is not None:
        raise InputError(f"--step-pattern: {path} is a run, whose steps are known; leave it out")
    models = _models_of_run(path) if is_run else _models_in_folder(path, pattern, report)
    if not models:
        raise InputError(f"{path}: no models in it; give a run with snapshots or checkpoints, or a folder of models")
    return sorted(models.items())


def model_at(path: str | Path, step: int, device: str = "cpu") -> tuple[MaskedLM, PreTrainedTokenizerBase]:
    """The model of a run (or in a folder) after `step` updates, in evaluation mode, and its tokenizer.

    A snapshot or a checkpoint, of the run or, before its branch, of an ancestor: whatever `list_models` lists.

    Raises:
        InputError: no model of this step is there, or as `list_models` and `load_model`.
    """
    models = dict(list_models(path))
    if step not in models:
        nearest = ", ".join(map(str, sorted(sorted(models, key=lambda other: abs(other - step))[:4])))
        raise InputError(f"{path}: has no model of step {step}; the nearest are of {nearest}")
    return load_model(models[step], device)


def _models_of_run(path: Path) -> dict[int, Path]:
    """Models by step. If several share a step, prefer snapshots to checkpoints, and the run's own to its parent's."""
    lineage: list[tuple[RunDirectory, float]] = [(RunDirectory(path), math.inf)]  # up to which step its models count
    while (run := lineage[-1][0]).lineage.is_file():
        parent, step = run.parent()
        if not parent.is_dir():
            raise InputError(f"{run.lineage}: the parent run {parent} is not there; put it back or correct parent_run")
        if parent in [member.path.resolve() for member, _ in lineage]:
            raise InputError(f"{run.lineage}: {parent} is also a descendant of this run; correct parent_run")
        lineage.append((RunDirectory(parent), min(step, lineage[-1][1])))
    models: dict[int, Path] = {}
    for kind in ("checkpoints", "snapshots"):
        for run, limit in reversed(lineage):
            models |= {step: model for step, model in steps_in(getattr(run, kind)).items() if step <= limit}
    return models


def _models_in_folder(folder: Path, pattern: re.Pattern[str] | None, report: Callable[[str], None]) -> dict[int, Path]:
    directories = sorted(path for path in folder.iterdir() if not path.name.startswith(".") and is_model(path))
    names = [directory.name for directory in directories]
    recorded = [_recorded_step(directory) for directory in directories]
    if pattern is not None:
        steps = [step_by_pattern(name, pattern, f"{folder}/{name}") for name in names]
    elif None not in recorded:
        steps = recorded
    else:
        steps = steps_of_names(names, str(folder), report)
        for name, step, known in zip(names, steps, recorded, strict=True):
            if known not in (None, step):
                raise InputError(
                    f"{folder}: {name} records step {known}, but would count as {step} by its name; {REMEDY}"
                )
    models: dict[int, Path] = {}
    for step, directory in zip(steps, directories, strict=True):
        if step in models:
            raise InputError(f"{folder}: {models[step].name} and {directory.name} are both number {step}; {REMEDY}")
        models[step] = directory
    return models


def _recorded_step(path: Path) -> int | None:
    """The step that a model records; None also for one that cannot be read, as loading it will say."""
    try:
        return model_step(path)
    except (InputError, OSError):
        return None


def _step_of_one(path: Path, pattern: re.Pattern[str] | None) -> int:
    """The step of a single model, which needs no place among others: 0 if it is not known."""
    if pattern is not None:
        return step_by_pattern(path.name, pattern, str(path))
    recorded = _recorded_step(path)
    if recorded is not None:
        return recorded
    try:
        return last_number(path.name, str(path)) or 0
    except InputError:
        return 0


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError(f"--step-pattern: {pattern!r} is no regular expression ({error}); correct it") from None
    if compiled.groups != 1 and "step" not in compiled.groupindex:
        raise InputError(
            f"--step-pattern: {pattern!r} has {compiled.groups} groups; put the step into the only one, as in "
            r"'step_(\d+)', or name its group: (?P<step>…)"
        )
    return compiled
