"""The directory of a run: the names of everything in it, and what a path given by a user stands for.

RUN/config.yaml             the configuration; it makes a directory a run
RUN/metrics.jsonl           records (`records.py`)
RUN/tensorboard/            the same for TensorBoard
RUN/checkpoints/step_…/     complete states (`checkpoint.py`)
RUN/checkpoints/latest      name of the newest of them
RUN/snapshots/step_…/       the model alone, as a Hugging Face directory
RUN/ring/step_…/            recent models, until an onset is detected
RUN/lineage.json            where a branch comes from
RUN/stop, RUN/requeue       a request to stop, and the mark of a run that wants to be started again
RUN/losses                  what a batch script's jobs have lost (docs/clusters.md); nothing here reads it
RUN/.lock                   held by the process that writes here
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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
        30.0, description="a run that makes no progress for so long ends, naming the process it waits for", gt=0, le=1e6
    )


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


@dataclass(frozen=True)
class RunDirectory:
    """The paths in a run's directory, which need not exist."""

    path: Path

    @property
    def config(self) -> Path:
        """The configuration of the newest start."""
        return self.path / CONFIG

    @property
    def records(self) -> Path:
        """One JSON object a line."""
        return self.path / RECORDS

    @property
    def tensorboard(self) -> Path:
        """Event files."""
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """Complete states by step."""
        return self.path / "checkpoints"

    @property
    def latest(self) -> Path:
        """Names the checkpoint that was published last."""
        return self.checkpoints / LATEST

    @property
    def snapshots(self) -> Path:
        """Models by step."""
        return self.path / "snapshots"

    @property
    def ring(self) -> Path:
        """Models by step that are forgotten unless an onset is detected."""
        return self.path / "ring"

    @property
    def lineage(self) -> Path:
        """The parent of a branch."""
        return self.path / "lineage.json"

    @property
    def stop(self) -> Path:
        """A file that asks the run to save and end."""
        return self.path / "stop"

    @property
    def requeue(self) -> Path:
        """A file with the reason why the run ended early and wants to be started again."""
        return self.path / "requeue"

    def checkpoint(self, step: int) -> Path:
        """The checkpoint after `step` updates."""
        return self.checkpoints / step_name(step)

    def is_run(self) -> bool:
        """Whether it holds models, or says where they come from."""
        return self.lineage.is_file() or self.snapshots.is_dir() or self.checkpoints.is_dir()

    def half_begun(self, path: Path) -> bool:
        """Whether `path` is what a run leaves that was killed while it wrote its configuration for the first time."""
        return path.name == LOCK or path.name.startswith(f".{CONFIG}.")

    def newest_checkpoint(self) -> Path | None:
        """The checkpoint that `latest` names; None without one."""
        if not self.latest.is_file():
            return None
        return self.checkpoints / Path(self.latest.read_text(encoding="utf-8").strip()).name

    def leftovers(self) -> list[Path]:
        """What a killed process left: half-written files, checkpoints and models, and half-deleted ones."""
        models = (self.checkpoints, self.snapshots, self.ring)
        written = (self.config, self.records, self.lineage, self.requeue, self.tensorboard)
        patterns = [f".{path.name}.*.tmp" for path in written]
        patterns += [f".{directory.name}.old" for directory in (*models, self.tensorboard)]
        for directory in models:
            patterns += [f"{directory.name}/.{what}" for what in ("step_*.tmp", "step_*.old", f"{LATEST}.*.tmp")]
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


def open_run(path: str | Path) -> RunDirectory:
    """The run at `path`.

    Raises:
        InputError: there is none.
    """
    run = RunDirectory(Path(path))
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
    return RunDirectory(Path(path)).newest_checkpoint() or Path(path)


def find_model(path: str | Path) -> Path:
    """The checkpoint or Hugging Face directory that a user's `path` stands for: itself, or the newest of a run.

    Raises:
        InputError: it is none of these.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path}: no such directory; give a Hugging Face directory or a training checkpoint")
    found = newest_of_run(path)
    if not is_model(found):
        raise InputError(f"{found}: neither a Hugging Face model ({HF_CONFIG}) nor a checkpoint ({MODEL_CONFIG})")
    return found
