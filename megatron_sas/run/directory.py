"""The directory of a run: the names of everything in it, and what a path given by a user stands for."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

from megatron_sas.core.cli import InputError
from megatron_sas.core.directory_lock import LOCK
from megatron_sas.core.manifest import MANIFEST
from megatron_sas.core.settings import Section

MODEL_CONFIG = "model.json"
MODEL_WEIGHTS = "model.safetensors"
TOKENIZER_DIRECTORY = "tokenizer"
STATE = "state.json"
CONFIG = "config.yaml"
"""The run's configuration, in the run's directory and in every checkpoint."""
OPTIMIZER_PREFIX = "optimizer-"
HF_CONFIG = "config.json"
"""What makes a directory a Hugging Face model."""
RECORDS = "metrics.jsonl"
LATEST = "latest"
LINEAGE_FORMAT, LINEAGE_VERSION = "megatron_sas lineage", 1

_STEP = re.compile(r"step_(\d{8,})")


class RunSection(Section):
    """Where a run lives and how it is repeated."""

    output_dir: str = Field(description="directory of the run: configuration, metrics, checkpoints")
    seed: int = Field(
        1234, description="initial weights, sample order, masks and dropout are functions of it", ge=0, lt=2**63
    )
    resume: Literal["auto", "never"] = Field(
        "auto", description="auto: continue from the newest checkpoint in output_dir; never: output_dir must be new"
    )
    branch_from: str | None = Field(
        None, description="checkpoint of another run, or a run (its newest): begin there and share its past exactly"
    )
    timeout_minutes: float = Field(
        30.0,
        description="stop the run after this long without progress, and report which process it was waiting for",
        gt=0,
        le=1e6,
    )


class Seeds(NamedTuple):
    """What the random parts of a run are functions of."""

    init: int  # initial weights
    data: int  # sample order and masks
    dropout: int


class SeedSection(Section):
    """Seeds of parts of a run, to vary one and keep another."""

    init: int | None = Field(None, description="of the initial weights; default: run.seed", ge=0, lt=2**63)
    data: int | None = Field(None, description="of sample order and masks; default: run.seed", ge=0, lt=2**63)
    dropout: int | None = Field(None, description="of dropout; default: run.seed", ge=0, lt=2**63)

    def seeds(self, seed: int) -> Seeds:
        """All of them, where `seed` is `run.seed`."""
        return Seeds(*(seed if own is None else own for own in (self.init, self.data, self.dropout)))


def describe_seeds(config: Mapping[str, Any]) -> int | str | None:
    """The seed of a run from its configuration as YAML has it, with those of parts that differ: 1, or "1, data 2"."""
    run, parts = (config.get(name) if isinstance(config.get(name), dict) else {} for name in ("run", "seed"))
    seed = run.get("seed")
    own = [f"{part} {value}" for part, value in parts.items() if value not in (None, seed)]
    return ", ".join([str(seed), *own]) if own else seed


def step_name(step: int) -> str:
    """Directory name of the model or checkpoint after `step` updates."""
    return f"step_{step:08d}"


def step_of(path: str | Path) -> int | None:
    """The step in the name of a model's or checkpoint's directory; None for another name."""
    match = _STEP.fullmatch(Path(path).name)
    return int(match[1]) if match and step_name(int(match[1])) == match[0] else None


def steps_in(directory: Path) -> dict[int, Path]:
    """The models or checkpoints in `directory`, which need not exist, by rising step."""
    found = {step: path for path in directory.glob("step_*") if (step := step_of(path)) is not None and path.is_dir()}
    return dict(sorted(found.items()))


class RunDirectory:
    """The paths in a run's directory, which need not exist."""

    def __init__(self, path: str | Path) -> None:
        self.path = path = Path(path)
        self.config = path / CONFIG  # of the newest start; it makes a directory a run
        self.records = path / RECORDS  # `records.py`
        self.tensorboard = path / "tensorboard"  # the same for TensorBoard
        self.checkpoints = path / "checkpoints"  # complete states by step (`checkpoint.py`)
        self.latest = self.checkpoints / LATEST  # name of the newest of them
        self.snapshots = path / "snapshots"  # models by step, as Hugging Face directories
        self.ring = path / "ring"  # recent models by step, until an onset is detected
        self.starts = path / "starts.json"  # command line, place, code and packages of every start (`starts.py`)
        self.lineage = path / "lineage.json"  # where a branch comes from
        self.stop = path / "stop"  # a request to save and end
        self.losses = path / "losses"  # why batch scripts had their jobs start again (docs/clusters.md)
        self.requeue = path / "requeue"  # why the run ended early and wants to be started again

    def checkpoint(self, step: int) -> Path:
        """The checkpoint after `step` updates."""
        return self.checkpoints / step_name(step)

    def is_run(self) -> bool:
        """Whether it holds models, or says where they come from."""
        return self.lineage.is_file() or self.snapshots.is_dir() or self.checkpoints.is_dir()

    def half_begun(self, path: Path) -> bool:
        """Whether `path` is what a run leaves that was killed while it wrote its configuration for the first time."""
        return path.name == LOCK or path.name.startswith(f".{CONFIG}.")

    def leftovers(self) -> list[Path]:
        """What a killed process left: half-written files, checkpoints and models, and half-deleted ones."""
        models = (self.checkpoints, self.snapshots, self.ring)
        written = (self.config, self.records, self.lineage, self.starts, self.requeue, self.tensorboard)
        patterns = [f".{path.name}.*.tmp" for path in written]
        patterns += [f".{directory.name}.old" for directory in (*models, self.tensorboard)]
        in_models = ("step_*.tmp", "step_*.old", f"{LATEST}.*.tmp")
        patterns += [f"{directory.name}/.{what}" for directory in models for what in in_models]
        return [path for pattern in patterns for path in self.path.glob(pattern)]

    def parent(self) -> tuple[Path, int]:
        """The directory of a branch's parent, and the step up to which its past is also this run's.

        Raises:
            InputError: the file that says so is not one that this program reads.
        """
        try:
            value = json.loads(self.lineage.read_text(encoding="utf-8"))
            if (value["format"], value["version"]) != (LINEAGE_FORMAT, LINEAGE_VERSION):
                raise ValueError(f"format {value['format']!r}, version {value['version']}")
            parent, step = (self.path / str(value["parent_run"])).resolve(), int(value["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{self.lineage}: is not a lineage that this program reads ({error}); copy it anew"
            ) from None
        return parent, step


def is_run_with(names: Collection[str]) -> bool:
    """Whether a directory in which these names are is a run: `CONFIG`, and something else that a start leaves."""
    run = RunDirectory("")
    left = (run.records, run.starts, run.checkpoints, run.snapshots, run.lineage)
    return CONFIG in names and not {LOCK, *(path.name for path in left)}.isdisjoint(names)


def is_model_with(names: Collection[str]) -> bool:
    """Whether a directory in which these names are is a model or checkpoint."""
    return not {MODEL_CONFIG, HF_CONFIG, MANIFEST}.isdisjoint(names)


def open_run(path: str | Path) -> RunDirectory:
    """The run at `path`.

    Raises:
        InputError: there is none.
    """
    run = RunDirectory(path)
    if not run.config.is_file():
        raise InputError(f"{path}: is not a run; give a directory that contains {CONFIG}")
    return run


def run_of(checkpoint: Path) -> RunDirectory:
    """The run that a checkpoint or snapshot lies in."""
    return RunDirectory(checkpoint.resolve().parent.parent)


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a training checkpoint, complete or not."""
    return (path / MODEL_CONFIG).is_file() or (path / MANIFEST).is_file()


def is_model(path: Path) -> bool:
    """Whether `path` is a training checkpoint or a Hugging Face directory."""
    return is_checkpoint(path) or (path / HF_CONFIG).is_file()


def newest_of_run(path: str | Path) -> Path:
    """The checkpoint published last if `path` is a run's directory, else `path` itself."""
    run = RunDirectory(path)
    if not run.latest.is_file():
        return run.path
    return run.checkpoints / Path(run.latest.read_text(encoding="utf-8").strip()).name


def find_model(path: str | Path) -> Path:
    """The checkpoint or Hugging Face directory that a user's `path` stands for: itself, or the newest of a run.

    Raises:
        InputError: it is none of these.
    """
    if not Path(path).is_dir():
        raise InputError(f"{path}: no such directory; give a Hugging Face directory or a training checkpoint")
    found = newest_of_run(path)
    if not is_model(found):
        raise InputError(f"{found}: neither a Hugging Face model ({HF_CONFIG}) nor a checkpoint ({MODEL_CONFIG})")
    return found
