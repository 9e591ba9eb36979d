"""Checkpoints: whole or absent, verified when read, and independent of ZeRO stage and number of processes.

    checkpoints/step_00001000/
        model.json           architecture
        model.safetensors    weights, float32
        optimizer-00000-of-00002.safetensors …   AdamW's moments; each process writes a share of the parameters
        tokenizer/           as Hugging Face saves it
        state.json           counters of the run
        config.yaml          the run's configuration
        manifest.json        size and SHA-256 of all of these
    checkpoints/latest       name of the newest complete checkpoint

Every rank writes and flushes its files in a hidden directory; when all have, rank 0 writes the manifest, renames the
directory and replaces the pointer (`saving.py` does this beside training). There is no random state to save: sample
order, masks and dropout are functions of (seed, step).
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_sas.core import distributed
from megatron_sas.core.cli import InputError
from megatron_sas.core.files import fsync_directory, fsync_file, remove, write_json_atomic, write_text_atomic
from megatron_sas.core.manifest import read_manifest, write_manifest
from megatron_sas.model.config import BertConfig
from megatron_sas.run.reading import (
    FORMAT,
    LATEST,
    MODEL_CONFIG,
    MODEL_WEIGHTS,
    OPTIMIZER_PREFIX,
    STATE,
    TOKENIZER_DIRECTORY,
    VERSION,
    checkpoints_directory,
    optimizer_shard,
    verify_checkpoint,
    write_model_config,
    write_weights,
)
from megatron_sas.train.step import MOMENTS, Engine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


CONFIG = "config.yaml"
"""The run's configuration, in the run's directory and in every checkpoint."""


def checkpoint_name(step: int) -> str:
    """Directory name of the checkpoint after `step` updates."""
    return f"step_{step:08d}"


@dataclass(frozen=True)
class Share:
    """What one rank writes, in host memory: float32 tensors by name. Empty for a rank that writes nothing."""

    weights: dict[str, Tensor]  # rank 0
    moments: dict[str, Tensor] | None  # None before the first update, or for a snapshot


def gather_share(engine: Engine, step: int, with_moments: bool) -> Share:
    """The weights (rank 0) and, if asked for, this rank's share of the moments. A collective."""
    names = [name for name, _ in engine.named_parameters()]
    weights = dict(engine.full_tensors(None, set(names) if distributed.is_main() else set()))
    if step == 0 or not with_moments:  # AdamW has no moments before its first update
        return Share(weights, None)
    share = set(names[distributed.rank() :: distributed.world_size()])
    moments = {f"{key}.{name}": tensor for key in MOMENTS for name, tensor in engine.full_tensors(key, share)}
    return Share(weights, moments)


def partial_directory(run_dir: str | Path, step: int, token: str) -> Path:
    """Where the checkpoint after `step` updates is written before it is renamed.

    `token` tells this start of the run from others: an orphan of an earlier one may still be writing to its own.
    """
    return checkpoints_directory(run_dir) / f".{checkpoint_name(step)}.{token}.tmp"


def refuse_nonfinite(share: Share) -> None:
    """Raise `OSError` if a weight or moment is NaN or infinite: what is saved before is worth more than this.

    Updates whose gradient is not finite change nothing, so this takes a learning rate that overflows, or a machine's
    fault.
    """
    for tensors in (share.weights, share.moments or {}):
        for name, tensor in tensors.items():
            # Through the extremes NaN spreads and infinities show; a mask of all elements takes longer than hashing.
            if tensor.numel() and not all(extreme.isfinite() for extreme in torch.aminmax(tensor)):
                raise OSError(f"{name} is not finite; the newest checkpoint is from before")


def write_share(directory: Path, share: Share) -> None:
    """Write and flush this rank's tensors. Communicates with nobody, so it may run beside training."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    if share.weights:
        written.append(directory / MODEL_WEIGHTS)
        write_weights(written[-1], share.weights)
    if share.moments is not None:
        written.append(directory / optimizer_shard(distributed.rank(), distributed.world_size()))
        write_weights(written[-1], share.moments)
    for path in written:
        fsync_file(path)


def write_description(
    directory: Path,
    bert_config: BertConfig,
    tokenizer: PreTrainedTokenizerBase,
    step: int,
    state: dict[str, Any],
    config_yaml: str,
) -> None:
    """Write all that is not tensors; rank 0's part."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(directory / TOKENIZER_DIRECTORY)
    write_model_config(directory / MODEL_CONFIG, bert_config)
    write_json_atomic(directory / STATE, {"step": step, **state})
    write_text_atomic(directory / CONFIG, config_yaml)
    for file in (directory / TOKENIZER_DIRECTORY).iterdir():
        fsync_file(file)


def publish(partial: Path, step: int) -> None:
    """Make a checkpoint of what all ranks have written and flushed, and point `latest` at it; rank 0 alone.

    Raises:
        OSError: a rank's shard is not here, so that rank writes to another disk; or one is that no rank has written.
    """
    final = partial.with_name(checkpoint_name(step))
    ranks = range(distributed.world_size() if step > 0 else 0)  # AdamW has no moments before its first update
    shards = [optimizer_shard(rank, len(ranks)) for rank in ranks]
    if absent := [shard for shard in shards if not (partial / shard).is_file()]:
        raise OSError(f"{absent[0]} is not there: run.output_dir must be one directory that all hosts share")
    if foreign := {path.name for path in partial.glob(f"{OPTIMIZER_PREFIX}*")}.difference(shards):
        raise OSError(f"{min(foreign)} is another program's: only this run may write to its run.output_dir")
    write_manifest(partial, format=FORMAT, version=VERSION, step=step)
    for path in [*partial.rglob("*"), partial]:
        if path.is_dir():
            fsync_directory(path)
    if os.path.lexists(final):  # a run that was resumed from before this step writes it again
        remove_directory(final)
    os.replace(partial, final)
    fsync_directory(final.parent)
    write_text_atomic(final.parent / LATEST, final.name + "\n")


def remove_old_checkpoints(run_dir: str | Path, step: int, keep_last: int, keep_every: int | None) -> None:
    """Remove all checkpoints before the one of `step`, which was just published, but the `keep_last` - 1 newest of them
    and those whose step is a multiple of `keep_every`.

    Later ones, which a run that fell back to an earlier checkpoint has not reached again, stay.
    """
    steps = [s for s in map(step_of, checkpoints_directory(run_dir).glob("step_*")) if s is not None and s < step]
    for old in sorted(steps, reverse=True)[keep_last - 1 :]:
        if keep_every is None or old % keep_every:
            remove_directory(checkpoints_directory(run_dir) / checkpoint_name(old))


def remove_directory(path: Path) -> None:
    """Remove a checkpoint, or another directory that must be whole or absent at any moment: rename it, then delete."""
    hidden = path.with_name(f".{path.name}.old")
    remove(hidden)
    os.replace(path, hidden)
    fsync_directory(path.parent)
    remove(hidden)


def remove_leftovers(run_dir: Path) -> list[Path]:
    """Remove what a killed run left: half-written files, checkpoints and snapshots, and half-deleted ones.

    Returns what there was.
    """
    directories = ("checkpoints", "snapshots", "ring")
    patterns = [f".{name}.*.tmp" for name in (CONFIG, "metrics.jsonl", "lineage.json", "requeue", "tensorboard")]
    patterns += [f".{name}.old" for name in (*directories, "tensorboard")]
    patterns += [f"{name}/.{what}" for name in directories for what in ("step_*.tmp", "step_*.old", f"{LATEST}.*.tmp")]
    found = [path for pattern in patterns for path in run_dir.glob(pattern)]
    for path in found:
        remove(path)
    return found


def step_of(path: Path) -> int | None:
    """The step in the name of a checkpoint's or snapshot's directory; None for another name."""
    digits = path.name.removeprefix("step_")
    return int(digits) if digits.isdecimal() and checkpoint_name(int(digits)) == path.name else None


def newest_checkpoint(run_dir: str | Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files all match its manifest; None when the run has none.

    Says which newer ones were passed over and why.

    Raises:
        InputError: there are checkpoints but all of them are damaged or cannot be read.
        OSError: nobody can say whether there are any.
    """
    parent, found = checkpoints_directory(run_dir), []
    with contextlib.suppress(FileNotFoundError):
        found = os.listdir(parent)  # not glob, which takes a directory that may not be read for an empty one
    names = sorted((name for name in found if step_of(Path(name)) is not None), reverse=True)
    with contextlib.suppress(OSError):  # first the one that was published last
        latest = (parent / LATEST).read_text(encoding="utf-8").strip()
        names.sort(key=lambda name: name != latest)
    for name in names:
        try:
            verify_checkpoint(parent / name)
            return parent / name
        except (InputError, OSError) as error:
            say(f"checkpoint {name} is passed over: {error}")
    if names:
        raise InputError(
            f"{parent}: none of the {len(names)} checkpoints is whole and readable; restore one, or choose another "
            "run.output_dir"
        )
    return None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The counters that `save_checkpoint` stored, with `step`."""
    state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    if state.get("step") != step_of(checkpoint):
        raise InputError(f"{checkpoint / STATE}: is of step {state.get('step')!r}; use another checkpoint")
    return state


def load_moments(engine: Engine, checkpoint: Path, updates: int) -> None:
    """Give the engine the optimizer state of a verified checkpoint; weights are loaded before the engine is built.

    `updates` are those that changed the weights.
    """
    with contextlib.ExitStack() as stack:
        where = {}
        for name in read_manifest(checkpoint)["files"]:  # those that were verified
            if name.startswith(OPTIMIZER_PREFIX):
                file = stack.enter_context(_open_tensors(checkpoint / name))
                where.update(dict.fromkeys(file.keys(), file))

        def read(key: str, name: str) -> torch.Tensor:
            full = f"{key}.{name}"
            if full not in where:
                raise InputError(f"{checkpoint}: has no {full}; the checkpoint belongs to another model")
            return where[full].get_tensor(full)

        engine.load_moments(read, updates)


def _open_tensors(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise InputError(f"{path}: is not a safetensors file ({error}); use another checkpoint") from None
