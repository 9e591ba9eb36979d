"""Checkpoints: complete or absent, verified when read, and independent of ZeRO stage and number of processes.

    checkpoints/step_00001000/
        model.json           architecture
        model.safetensors    weights, float32
        optimizer-00000-of-00002.safetensors …   the optimizer's moments; each process writes a share of the parameters
        tokenizer/           as Hugging Face saves it
        state.json           counters of the run
        config.yaml          the run's configuration
        manifest.json        size and SHA-256 of all of these
    checkpoints/latest       name of the newest complete checkpoint

Every rank writes and flushes its files in a hidden directory; when all have, rank 0 writes the manifest, renames the
directory and replaces the pointer (`saver.py` does this next to training). There is no random state to save: sample
order, masks and dropout are functions of (seed, step).
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_sas.core import distributed
from megatron_sas.core.cli import InputError
from megatron_sas.core.files import fsync_directory, fsync_file, remove, write_json_atomic, write_text_atomic
from megatron_sas.core.manifest import read_manifest, write_manifest
from megatron_sas.model.config import ModelConfig
from megatron_sas.run import directory as names
from megatron_sas.run.directory import RunDirectory, step_name, step_of, steps_in
from megatron_sas.run.reading import (
    FORMAT,
    VERSION,
    optimizer_shard,
    verify_checkpoint,
    write_model_config,
    write_weights,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TrainingState(Protocol):
    """What a checkpoint is made of and given back to: weights and optimizer moments as full float32 tensors by name."""

    moments: tuple[str, ...]  # names of what the optimizer keeps for a parameter

    def named_parameters(self) -> list[tuple[str, Any]]:
        """The model's parameters in a fixed order."""

    def full_tensors(self, key: str | None, names: set[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Every weight (`key` None) or moment `key`; a collective, in which a rank gets only those in `names`."""

    def load_moments(self, read: Callable[[str, str], Tensor], updates: int) -> None:
        """Take moments from `read(key, name)`, as they are after `updates` updates."""


@dataclass(frozen=True)
class RankSlice:
    """What one rank writes, in host memory: float32 tensors by name. Empty for a rank that writes nothing."""

    weights: dict[str, Tensor]  # rank 0
    moments: dict[str, Tensor] | None  # None before the first update, or for a snapshot


def gather_slice(engine: TrainingState, step: int, with_moments: bool) -> RankSlice:
    """The weights (rank 0) and, if asked for, this rank's share of the moments. A collective."""
    parameters = [name for name, _ in engine.named_parameters()]
    weights = dict(engine.full_tensors(None, set(parameters) if distributed.is_main() else set()))
    if step == 0 or not with_moments:  # there are no moments before the first update
        return RankSlice(weights, None)
    share = set(parameters[distributed.rank() :: distributed.world_size()])
    moments = {f"{key}.{name}": tensor for key in engine.moments for name, tensor in engine.full_tensors(key, share)}
    return RankSlice(weights, moments)


def partial_directory(run: RunDirectory, step: int, token: str) -> Path:
    """Where the checkpoint after `step` updates is written before it is renamed.

    `token` tells this start of the run from others: an orphan of an earlier one may still be writing to its own.
    """
    return run.checkpoints / f".{step_name(step)}.{token}.tmp"


def check_finite(part: RankSlice) -> None:
    """Raise `OSError` if a weight or moment is NaN or infinite: what is saved before is worth more than this.

    Updates whose gradient is not finite change nothing, so this takes a learning rate that overflows, or a machine's
    fault.
    """
    for name, tensor in (part.weights | (part.moments or {})).items():
        # Through the extremes NaN spreads and infinities show; a mask of all elements takes longer than hashing.
        if tensor.numel() and not all(extreme.isfinite() for extreme in torch.aminmax(tensor)):
            raise OSError(f"{name} is not finite; the newest checkpoint is from before")


def write_slice(directory: Path, part: RankSlice) -> None:
    """Write and flush this rank's tensors. Communicates with nobody, so it may run next to training."""
    directory.mkdir(parents=True, exist_ok=True)
    files = {names.MODEL_WEIGHTS: part.weights} if part.weights else {}
    if part.moments is not None:
        files[optimizer_shard(distributed.rank(), distributed.world_size())] = part.moments
    for name, tensors in files.items():
        write_weights(directory / name, tensors)
    for name in files:
        fsync_file(directory / name)


def write_description(
    directory: Path,
    step: int,
    state: dict[str, Any],
    *,
    bert_config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    config_yaml: str,
) -> None:
    """Write all that is not tensors; rank 0's part."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(directory / names.TOKENIZER_DIRECTORY)
    write_model_config(directory / names.MODEL_CONFIG, bert_config)
    write_json_atomic(directory / names.STATE, {"step": step, **state})
    write_text_atomic(directory / names.CONFIG, config_yaml)
    for file in (directory / names.TOKENIZER_DIRECTORY).iterdir():
        fsync_file(file)


def publish(partial: Path, step: int, world_size: int) -> None:
    """Make a checkpoint of what all ranks have written and flushed, and point `latest` at it; rank 0 alone.

    Raises:
        OSError: a rank's shard is not here, so that rank writes to another disk; or one is that no rank has written.
    """
    final = partial.with_name(step_name(step))
    ranks = world_size if step > 0 else 0  # there are no moments before the first update
    shards = [optimizer_shard(rank, ranks) for rank in range(ranks)]
    if absent := [shard for shard in shards if not (partial / shard).is_file()]:
        raise OSError(f"{absent[0]} is not there: run.output_dir must be one directory that all hosts share")
    if foreign := {path.name for path in partial.glob(f"{names.OPTIMIZER_PREFIX}*")}.difference(shards):
        raise OSError(f"{min(foreign)} is another program's: only this run may write to its run.output_dir")
    write_manifest(partial, format=FORMAT, version=VERSION, step=step)
    for path in [*partial.rglob("*"), partial]:
        if path.is_dir():
            fsync_directory(path)
    if os.path.lexists(final):  # a run that was resumed from before this step writes it again
        remove_directory(final)
    os.replace(partial, final)
    fsync_directory(final.parent)
    write_text_atomic(final.parent / names.LATEST, final.name + "\n")


def remove_old_checkpoints(run: RunDirectory, step: int, keep_last: int, keep_every: int | None) -> None:
    """Remove all checkpoints before the one of `step`, which was just published, but the `keep_last` - 1 newest of them
    and those whose step is a multiple of `keep_every`.

    Later ones, which a run that fell back to an earlier checkpoint has not reached again, stay.
    """
    older = [old for old in steps_in(run.checkpoints).items() if old[0] < step]
    for old, path in older[: max(0, len(older) - (keep_last - 1))]:
        if keep_every is None or old % keep_every:
            remove_directory(path)


def remove_directory(path: Path) -> None:
    """Remove a directory that must be complete or absent at any moment: rename it, then delete."""
    hidden = path.with_name(f".{path.name}.old")
    remove(hidden)
    os.replace(path, hidden)
    fsync_directory(path.parent)
    remove(hidden)


def newest_checkpoint(
    run_dir: str | Path, log: Callable[[str], None], verify: Callable[[Path], None] = verify_checkpoint
) -> Path | None:
    """The newest checkpoint that `verify` takes; None when the run has none.

    `log` gets a line for every newer one that is passed over, with the reason.

    Raises:
        InputError: there are checkpoints but all of them are damaged or cannot be read.
        OSError: nobody can say whether there are any.
    """
    parent, present = RunDirectory(run_dir).checkpoints, []
    with contextlib.suppress(FileNotFoundError):
        present = os.listdir(parent)  # not glob, which takes a directory that may not be read for an empty one
    steps = sorted((name for name in present if step_of(name) is not None), reverse=True)
    with contextlib.suppress(OSError):  # first the one that was published last
        latest = (parent / names.LATEST).read_text(encoding="utf-8").strip()
        steps.sort(key=lambda name: name != latest)
    for name in steps:
        try:
            verify(parent / name)
            return parent / name
        except (InputError, OSError) as error:
            log(f"checkpoint {name} is passed over: {error}")
    if steps:
        raise InputError(
            f"{parent}: none of the {len(steps)} checkpoints is whole and readable; restore one, or choose another "
            "run.output_dir"
        )
    return None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The counters of a verified checkpoint, with `step`."""
    state = json.loads((checkpoint / names.STATE).read_text(encoding="utf-8"))
    if state.get("step") != step_of(checkpoint):
        raise InputError(f"{checkpoint / names.STATE}: is of step {state.get('step')!r}; use another checkpoint")
    return state


def load_moments(engine: TrainingState, checkpoint: Path, updates: int) -> None:
    """Give the engine the optimizer state of a verified checkpoint; weights are loaded before the engine is built.

    `updates` are those that changed the weights.
    """
    with contextlib.ExitStack() as stack:
        where = {}
        for name in read_manifest(checkpoint)["files"]:  # those that were verified
            if not name.startswith(names.OPTIMIZER_PREFIX):
                continue
            try:
                file = stack.enter_context(safe_open(checkpoint / name, framework="pt"))
            except SafetensorError as error:
                reason = f"is not a safetensors file ({error})"
                raise InputError(f"{checkpoint / name}: {reason}; use another checkpoint") from None
            where.update(dict.fromkeys(file.keys(), file))

        def read(key: str, name: str) -> Tensor:
            full = f"{key}.{name}"
            if full not in where:
                raise InputError(f"{checkpoint}: has no {full}; the checkpoint belongs to another model")
            return where[full].get_tensor(full)

        engine.load_moments(read, updates)
