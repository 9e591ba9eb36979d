"""Measurements of a trajectory's models on disk: one directory a model, whole or absent.

settings.json               what is measured on what; the same for all points
points/step_%08d/point.json numbers
points/step_%08d/items.npz  which edges and which minimal pairs were right, for resampling
"""

from __future__ import annotations

import contextlib
import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sas.core.cli import InputError
from megatron_sas.core.directory_lock import LOCK, DirectoryLock
from megatron_sas.core.files import atomic_directory, finite, remove, write_json_atomic, write_text_atomic
from megatron_sas.evaluation.blimp_labels import renew_result
from megatron_sas.evaluation.items import Items
from megatron_sas.evaluation.minimal_pairs import BLIMP
from megatron_sas.evaluation.registry import EVALUATIONS
from megatron_sas.run.directory import step_name, step_of

TRAJECTORY = "trajectory"
"""Where in a run's directory the measurements of its models go, unless they are wanted elsewhere."""

FORMAT = "megatron_sas trajectory"
VERSION = 1
SETTINGS = "settings.json"
POINTS = "points"
POINT = "point.json"
ITEMS = "items.npz"
HINTS = ("path", "prefix")  # where inputs were: they may move, their checksums decide


@contextlib.contextmanager
def writing(directory: str | Path, settings: dict[str, Any]) -> Iterator[None]:
    """Hold a trajectory's directory for one writer; makes it, or checks that it was made with the same settings.

    `settings` are JSON values; `format` and `version` are added. What a killed writer left half-done is removed.

    Raises:
        InputError: another process writes there, or the directory is something else or has other settings.
    """
    directory = Path(directory)
    path = directory / SETTINGS
    settings = {"format": FORMAT, "version": VERSION, **settings}
    foreign = directory.exists() and (not directory.is_dir() or any(map(_is_foreign, directory.iterdir())))
    if foreign and not path.is_file():
        raise InputError(f"{directory}: exists but is no trajectory (no {SETTINGS}); choose another --output")
    (directory / POINTS).mkdir(parents=True, exist_ok=True)
    with contextlib.closing(DirectoryLock(directory, "wait for it or choose another --output")) as lock:
        lock.take()
        if path.is_file():
            _check_same_settings(path, read_settings(directory), settings)
        else:
            write_json_atomic(path, settings)
        for leftover in (directory / POINTS).glob(".step_*"):
            remove(leftover)
        yield


def read_settings(directory: str | Path) -> dict[str, Any]:
    """The settings of a trajectory. Raises `InputError` when there are none that this program reads."""
    path = Path(directory) / SETTINGS
    value = _read_object(path)
    if (value.get("format"), value.get("version")) != (FORMAT, VERSION):
        raise InputError(f"{path}: not a {FORMAT!r} of version {VERSION}; measure again with tools/eval_trajectory.py")
    return value


def point_directory(directory: str | Path, step: int) -> Path:
    """Where the measurements of one model are."""
    return Path(directory) / POINTS / step_name(step)


def write_point(directory: str | Path, step: int, values: dict[str, Any], items: Mapping[str, Items]) -> None:
    """Write one point, replacing a damaged one; numbers that JSON lacks become null. `items` are by evaluation."""
    with atomic_directory(point_directory(directory, step), overwrite=True) as temporary:
        content = json.dumps(finite({"step": step, **values}), ensure_ascii=False, allow_nan=False)
        write_text_atomic(temporary / POINT, content + "\n")
        arrays = {name: array for single in items.values() for name, array in single.arrays().items()}
        np.savez_compressed(temporary / ITEMS, **arrays)


def read_point(directory: str | Path, step: int) -> dict[str, Any]:
    """The numbers of one point, BLiMP's with its four fields even if the point is old.

    Raises `InputError` when it is not there or damaged.
    """
    path = point_directory(directory, step) / POINT
    value = _read_object(path)
    if value.get("step") != step:
        raise InputError(f"{path}: is of step {value.get('step')!r}; remove the directory and measure again")
    if isinstance(result := value.get(BLIMP.point[0]), dict):
        value[BLIMP.point[0]] = renew_result(result)
    return value


def is_whole(directory: str | Path, step: int) -> bool:
    """Whether a point is there and readable."""
    try:
        read_point(directory, step)
        read_items(directory, step)
    except InputError:
        return False
    return True


def point_steps(directory: str | Path) -> list[int]:
    """The steps of all points, damaged ones too, rising."""
    steps = (step_of(path) for path in (Path(directory) / POINTS).glob("step_*"))
    return sorted(step for step in steps if step is not None)


def read_points(directory: str | Path) -> list[dict[str, Any]]:
    """The numbers of all points, by rising step. Raises `InputError` when one is damaged."""
    return [read_point(directory, step) for step in point_steps(directory)]


def read_items(directory: str | Path, step: int) -> dict[str, Items]:
    """The items of one point by evaluation, of those that have some. Raises `InputError` when they are damaged."""
    path = point_directory(directory, step) / ITEMS
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        every = {name: e.items.from_arrays(arrays) for name, e in EVALUATIONS.items() if e.items is not None}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: cannot be read ({error}); remove the directory and measure again") from None
    return {name: items for name, items in every.items() if items is not None}


def _is_foreign(path: Path) -> bool:
    """Whether a file is none that a killed writer may leave before there are settings."""
    return path.name not in (POINTS, LOCK) and not path.name.startswith(f".{SETTINGS}.")


def _check_same_settings(path: Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Compare as JSON values, without hints."""
    stored, wanted = _without_hints(stored), _without_hints(json.loads(json.dumps(wanted)))
    for name in sorted(stored.keys() | wanted.keys()):
        if (before := stored.get(name)) != (now := wanted.get(name)):
            raise InputError(
                f"{path}: was measured with another {name} ({json.dumps(before)}, now {json.dumps(now)}); give the "
                "same or choose another --output"
            )


def _without_hints(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_hints(item) for name, item in value.items() if name not in HINTS}
    return value


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; make it with tools/eval_trajectory.py") from None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise InputError(f"{path}: does not hold a JSON object; remove it and measure again")
    return value
