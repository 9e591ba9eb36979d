"""Which models there are over the course of a training run: snapshots and checkpoints, or a folder of models."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from pathlib import Path

from megatron_sas.core.cli import InputError
from megatron_sas.run.reading import checkpoints_directory, is_checkpoint

SNAPSHOTS, RING = "snapshots", "ring"
LINEAGE = "lineage.json"
LINEAGE_FORMAT, LINEAGE_VERSION = "megatron_sas lineage", 1

_STEP = re.compile(r"step_(\d{8,})")
_NUMBER = re.compile(r"(?<!\d)(?<!\d[.,])(\d+(?:[.,]\d+)*)([kKmM]?)(?![a-zA-Z0-9]|[.,]\d)")
_GROUPED = re.compile(r"\d{1,3}(\.\d{3})+")  # 1.000 may be one or a thousand
_FACTORS = {"": 1, "k": 1_000, "m": 1_000_000}


def list_models(path: str | Path) -> list[tuple[int, Path]]:
    """(step, directory) of every model of a run or in a folder, by rising step.

    Args:
        path: a run directory: its snapshots and checkpoints and, if it is a branch (lineage.json), those of its
            ancestors up to the branch; where a step has both, the snapshot. Or a folder of model directories
            (Hugging Face or checkpoints): the step is the last number in the name, with k and M as thousand and
            million (`seed_0-step_20k` is 20000, `step_1.5M` 1500000), or the place in the order of names if one of them
            has no number. Or one model: its step is such a number in its name, else 0.

    Raises:
        InputError: there are no models, two have the same number or one has a number that is no step (`1e5`, `1,000`,
            `1.5`), or the parent of a branched run is not there.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path}: no such directory; give a run, or a folder of models")
    if _is_model(path):
        try:
            return [(_last_number(path) or 0, path)]
        except InputError:  # a single model needs no place among others
            return [(0, path)]
    models = _models_of_run(path) if _is_run(path) else _models_in_folder(path)
    if not models:
        raise InputError(f"{path}: no models in it; give a run with snapshots or checkpoints, or a folder of models")
    return sorted(models.items())


def _is_model(path: Path) -> bool:
    return is_checkpoint(path) or (path / "config.json").is_file()


def _is_run(path: Path) -> bool:
    return (path / LINEAGE).is_file() or (path / SNAPSHOTS).is_dir() or checkpoints_directory(path).is_dir()


def _models_of_run(run: Path) -> dict[int, Path]:
    """Models by step; of several at one step a snapshot before a checkpoint, the run's own before a parent's."""
    lineage: list[Path] = [run]
    limits: list[int | None] = [None]  # up to which step the models of each are part of this run's past
    while (lineage[-1] / LINEAGE).is_file():
        parent, step = read_lineage(lineage[-1])
        if not parent.is_dir():
            raise InputError(
                f"{lineage[-1] / LINEAGE}: the parent run {parent} is not there; put it back or correct parent_run"
            )
        if parent in [member.resolve() for member in lineage]:
            raise InputError(f"{lineage[-1] / LINEAGE}: {parent} is also a descendant of this run; correct parent_run")
        lineage.append(parent)
        limits.append(step if limits[-1] is None else min(step, limits[-1]))
    models: dict[int, Path] = {}
    for kind in (checkpoints_directory, lambda parent: parent / SNAPSHOTS):
        for member, limit in zip(reversed(lineage), reversed(limits), strict=True):
            for directory in kind(member).glob("step_*"):
                match = _STEP.fullmatch(directory.name)
                if match and directory.is_dir() and (limit is None or int(match[1]) <= limit):
                    models[int(match[1])] = directory
    return models


def read_lineage(run: Path) -> tuple[Path, int]:
    """The parent's directory, and the step up to which its past is also this run's."""
    path = run / LINEAGE
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if (value["format"], value["version"]) != (LINEAGE_FORMAT, LINEAGE_VERSION):
            raise ValueError(f"format {value['format']!r}, version {value['version']}")
        parent, step = (run / str(value["parent_run"])).resolve(), int(value["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: is not a lineage that this program reads ({error}); copy it anew") from None
    return parent, step


def _models_in_folder(folder: Path) -> dict[int, Path]:
    directories = sorted(path for path in folder.iterdir() if not path.name.startswith(".") and _is_model(path))
    if not all(_NUMBER.search(directory.name) for directory in directories):
        return dict(enumerate(directories))
    models: dict[int, Path] = {}
    for directory in directories:
        number = _last_number(directory)
        if number in models:
            raise InputError(
                f"{folder}: {models[number].name} and {directory.name} are both number {number}; "
                "put the models of each series into a folder of their own"
            )
        models[number] = directory
    return models


def _last_number(path: Path) -> int | None:
    found = list(_NUMBER.finditer(path.name))
    if not found:
        return None
    digits, unit = found[-1].groups()
    exponent = re.search(r"\d[eE][+-]?$", path.name[: found[-1].start()])
    if exponent is None and re.fullmatch(r"\d+(\.\d+)?", digits) and (unit or not _GROUPED.fullmatch(digits)):
        number = Decimal(digits) * _FACTORS[unit.lower()]
        if number == int(number):
            return int(number)
    raise InputError(
        f"{path}: the last number in its name is no step that can be read for sure; write it as in 1500, 20k or 1.5M"
    )
