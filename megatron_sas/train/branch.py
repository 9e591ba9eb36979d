"""Branches: runs that begin at a checkpoint of another run and share its past.

A branch continues the parent's weights, moments and counters, and its records begin with the parent's. What it is must
be true of that past as well, so its configuration may differ from the parent's only in what takes effect later
(docs/branching.md has the list). `RUN/lineage.json` says where a branch comes from.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sas.config import Config, load_config
from megatron_sas.core.cli import InputError
from megatron_sas.core.files import sha256_file, write_bytes_atomic, write_json_atomic
from megatron_sas.core.manifest import MANIFEST
from megatron_sas.objective.terms import TERMS
from megatron_sas.optim.schedules import Schedule
from megatron_sas.run.checkpoint import newest_checkpoint, read_state, remove_directory
from megatron_sas.run.directory import (
    CONFIG,
    LINEAGE_FORMAT,
    LINEAGE_VERSION,
    RECORDS,
    RunDirectory,
    is_checkpoint,
    run_of,
)
from megatron_sas.run.reading import verify_checkpoint
from megatron_sas.run.records import lines_until

UNTRAINED = ("run", "checkpoint", "snapshots", "evaluation", "logging", "watch")
"""Sections that do not touch what is trained, so that a continued run and a branch may change them, but `run.seed`."""
UNTRAINED_FIELDS = ("train.steps", "train.zero_stage", "train.deepspeed_config", "train.max_nonfinite_updates")
"""Fields of which that is true as well."""
BY_CONTENT = ("data.train", "data.validation", "data.tokenizer")
"""Paths whose contents are compared when they are opened, for a branch and a continued run alike."""
RECORDED = (*TERMS, "data", "masking", "train")
"""Sections whose changes lineage.json names: the others do not touch what is trained."""


@dataclass(frozen=True)
class Branch:
    """Where a new run begins."""

    checkpoint: Path  # verified
    lineage: dict[str, Any]  # the content of lineage.json

    @property
    def step(self) -> int:
        """Updates that the parent has made there."""
        return self.lineage["step"]

    @property
    def link(self) -> dict[str, Any]:
        """The entry for the list of ancestors in a checkpoint's state, oldest first."""
        return {name: value for name, value in self.lineage.items() if name not in ("format", "version")}


def find_branch(config: Config, log: Callable[[str], None]) -> Branch:
    """The verified checkpoint that `run.branch_from` names, for a run that may branch off there.

    Raises:
        InputError: there is none, it lies in no run, or the configuration contradicts the parent's past.
    """
    source, where = Path(config.run.branch_from), f"run.branch_from: {config.run.branch_from}"
    if not source.is_dir():
        raise InputError(f"{where}: no such directory; give a run or a checkpoint of one")
    if is_checkpoint(source):
        verify_checkpoint(source)
    checkpoint = source if is_checkpoint(source) else newest_checkpoint(source, log)
    if checkpoint is None:
        raise InputError(f"{where}: has no checkpoint; give a run or a checkpoint of one")
    parent = run_of(checkpoint)
    in_run = checkpoint.resolve().parent == parent.checkpoints and parent.records.is_file()
    if not in_run or not (checkpoint / CONFIG).is_file():
        raise InputError(
            f"{where}: is not in the run that wrote it, whose {RECORDS} a branch begins with; give the checkpoint "
            "there (model.init_from takes weights alone, from anywhere)"
        )
    old, step = load_config(checkpoint / CONFIG), read_state(checkpoint)["step"]
    _check_same_past(old, config, step, checkpoint)
    run_dir = Path(config.run.output_dir).resolve()
    lineage = {
        "format": LINEAGE_FORMAT,
        "version": LINEAGE_VERSION,
        "parent_run": _path_between(run_dir, parent.path),
        "checkpoint": checkpoint.resolve().name,
        "step": step,
        "manifest_sha256": sha256_file(checkpoint / MANIFEST),
        "changed": _changes(old, config, RECORDED),
    }
    return Branch(checkpoint, lineage)


def begin_branch(run: RunDirectory, branch: Branch) -> None:
    """Give a run without a checkpoint of its own the parent's records; what an earlier attempt left goes.

    Whenever this is interrupted, the run still has no checkpoint, and so begins here again.
    """
    for directory in (run.tensorboard, run.snapshots, run.ring):
        if directory.exists():
            remove_directory(directory)
    write_json_atomic(run.lineage, branch.lineage)
    write_bytes_atomic(run.records, lines_until(run_of(branch.checkpoint).records, branch.step))


def _check_same_past(old: Config, new: Config, step: int, checkpoint: Path) -> None:
    """The new configuration must hold for the updates that the parent has made."""
    where = f"run.branch_from: {checkpoint}"
    refused = {name: values for name, values in _changes(old, new).items() if not _may_change(name)}
    if refused:
        before, after = next(iter(refused.values()))
        example = f" ({json.dumps(before)}, not {json.dumps(after)})" if len(refused) == 1 else ""
        raise InputError(
            f"{where} was made with other values of {', '.join(refused)}{example}; restore them: a branch may change "
            f"{', '.join(TERMS)}, data.heads, masking.rate, and what does not touch training"
        )
    for name in TERMS:
        before, after = getattr(old, name).schedule, getattr(new, name).schedule
        if (other := _first_difference(before, after, step)) is not None:
            stages = json.dumps(old.model_dump(mode="json")[name]["schedule"])
            raise InputError(
                f"{where}: {name}.schedule says λ = {after(other):g} for update {other + 1}, which was made with "
                f"λ = {before(other):g}; keep the parent's stages up to update {step} ({stages}) and change what "
                "follows"
            )
    before, after = old.masking_rate(), new.masking_rate()
    if (other := _first_difference(before, after, step)) is not None:
        raise InputError(
            f"{where}: masking.rate says {after(other):g} for update {other + 1}, which was made with "
            f"{before(other):g}; keep the parent's rates up to update {step} and change what follows"
        )
    if new.train.steps <= step:
        raise InputError(f"train.steps: {new.train.steps} leaves nothing to do after step {step} of {checkpoint}")


def _first_difference(before: Schedule, after: Schedule, step: int) -> int | None:
    """The first of the completed updates below `step` for which two schedules have other values."""
    return next((done for done in range(step) if before(done) != after(done)), None)


def _may_change(name: str) -> bool:
    known = name.split(".")[0] in (*TERMS, *UNTRAINED) or name in ("data.heads", "masking.rate", *UNTRAINED_FIELDS)
    return known and name != "run.seed"


def _changes(old: Config, new: Config, sections: tuple[str, ...] | None = None) -> dict[str, list[Any]]:
    """`section.field` of what differs, with both values as JSON has them; where data lie does not count."""
    return {
        name: values
        for name, values in old.differences(new).items()
        if name not in BY_CONTENT and (sections is None or name.split(".")[0] in sections)
    }


def _path_between(run_dir: Path, parent: Path) -> str:
    """`parent` as seen from `run_dir`, so that both can be moved together; absolute where they share only the root."""
    if len(Path(os.path.commonpath([run_dir, parent])).parts) < 2:
        return str(parent)
    return os.path.relpath(parent, run_dir)
