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

Everything is written into a hidden directory, flushed, and renamed; then the pointer is replaced. There is no random
state to save: sample order, masks and dropout are functions of (seed, step).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from megatron_sas import distributed
from megatron_sas.cli import InputError
from megatron_sas.engine.engine import MOMENTS, Engine
from megatron_sas.files import fsync_directory, fsync_file, write_json_atomic, write_text_atomic
from megatron_sas.manifest import write_manifest
from megatron_sas.model.pretrained import (
    FORMAT,
    LATEST,
    MODEL_CONFIG,
    MODEL_WEIGHTS,
    OPTIMIZER_PREFIX,
    STATE,
    TOKENIZER_DIRECTORY,
    VERSION,
    checkpoints_directory,
    verify_checkpoint,
    write_model_config,
    write_weights,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def checkpoint_name(step: int) -> str:
    """Directory name of the checkpoint after `step` updates."""
    return f"step_{step:08d}"


def save_checkpoint(
    run_dir: str | Path,
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    step: int,
    state: dict[str, Any],
    config_yaml: str,
) -> Path:
    """Write the checkpoint after `step` updates and point `latest` at it. A collective; returns its directory.

    Raises:
        OSError: on every rank, when any rank could not write; the partial checkpoint is removed.
    """
    parent = checkpoints_directory(run_dir)
    final, partial = parent / checkpoint_name(step), parent / f".{checkpoint_name(step)}.tmp"

    def prepare() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        tokenizer.save_pretrained(partial / TOKENIZER_DIRECTORY)
        write_model_config(partial / MODEL_CONFIG, engine.bert.config)
        write_json_atomic(partial / STATE, {"step": step, **state})
        write_text_atomic(partial / "config.yaml", config_yaml)

    def publish() -> None:
        for file in partial.rglob("*"):
            fsync_file(file) if file.is_file() else fsync_directory(file)
        write_manifest(partial, format=FORMAT, version=VERSION, step=step)
        if final.exists():  # a run that was resumed from before this step writes it again
            shutil.rmtree(final)
        os.replace(partial, final)
        fsync_directory(parent)
        write_text_atomic(parent / LATEST, final.name + "\n")

    try:
        _together(prepare if distributed.is_main() else None, final)
        _together(lambda: _write_tensors(engine, partial, step), final)
        _together(publish if distributed.is_main() else None, final)
    except OSError:
        if distributed.is_main():
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def _together(action: Callable[[], None] | None, where: Path) -> None:
    """Run `action` on this rank, wait for all, and raise on all ranks if it failed on any."""
    fault = None
    if action is not None:
        try:
            action()
        except Exception as error:
            fault = f"rank {distributed.rank()}: {error}"
    faults = [f for f in distributed.gather_objects(fault) if f]
    if faults:
        raise OSError(f"{where}: could not be written ({faults[0]})")


def _write_tensors(engine: Engine, directory: Path, step: int) -> None:
    """The weights (rank 0) and this rank's share of the moments. Gathering is collective, so a failed write waits."""
    names = [name for name, _ in engine.named_parameters()]
    everything = set(names) if distributed.is_main() else set()
    weights = dict(engine.full_tensors(None, everything))
    moments = {}
    if step > 0:  # AdamW has no moments before its first update
        share = set(names[distributed.rank() :: distributed.world_size()])
        for key in MOMENTS:
            moments.update({f"{key}.{name}": tensor for name, tensor in engine.full_tensors(key, share)})
    if weights:
        write_weights(directory / MODEL_WEIGHTS, weights)
    if step > 0:
        shard = f"{OPTIMIZER_PREFIX}{distributed.rank():05d}-of-{distributed.world_size():05d}.safetensors"
        write_weights(directory / shard, moments)


def newest_checkpoint(run_dir: str | Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files all match its manifest; None when the run has none.

    Says which newer ones were passed over and why.

    Raises:
        InputError: there are checkpoints but all of them are damaged.
    """
    parent = checkpoints_directory(run_dir)
    names = sorted((path.name for path in parent.glob("step_*") if path.is_dir()), reverse=True)
    with contextlib.suppress(OSError):  # first the one that was published last
        latest = (parent / LATEST).read_text(encoding="utf-8").strip()
        names.sort(key=lambda name: name != latest)
    for name in names:
        try:
            verify_checkpoint(parent / name)
            return parent / name
        except InputError as error:
            say(f"checkpoint {name} is passed over: {error}")
    if names:
        raise InputError(f"{parent}: none of the {len(names)} checkpoints is whole; choose another run.output_dir")
    return None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The counters that `save_checkpoint` stored, with `step`."""
    return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))


def load_moments(engine: Engine, checkpoint: Path, step: int) -> None:
    """Give the engine the optimizer state of a verified checkpoint; weights are loaded before the engine is built."""
    if step == 0:
        return
    with contextlib.ExitStack() as stack:
        where = {}
        for path in sorted(checkpoint.glob(f"{OPTIMIZER_PREFIX}*.safetensors")):
            file = stack.enter_context(safe_open(path, framework="pt"))
            where.update(dict.fromkeys(file.keys(), file))

        def read(key: str, name: str) -> torch.Tensor:
            full = f"{key}.{name}"
            if full not in where:
                raise InputError(f"{checkpoint}: has no {full}; the checkpoint belongs to another model")
            return where[full].get_tensor(full)

        engine.load_moments(read, step)
