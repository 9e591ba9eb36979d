"""Reading a model from disk: a Hugging Face directory, a training checkpoint, or a run (its newest checkpoint)."""

from __future__ import annotations

import errno
import json
import pickle
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_sas.core.cli import InputError, first_line
from megatron_sas.core.files import obey_umask, write_json_atomic
from megatron_sas.core.manifest import read_manifest, verify_manifest
from megatron_sas.data.tokenizer import load_tokenizer, tokenizer_digest
from megatron_sas.model.architectures import ARCHITECTURES, DEFAULT, build_model
from megatron_sas.model.base import MaskedLM
from megatron_sas.model.config import ModelConfig
from megatron_sas.model.foreign import ForeignModel, load_foreign
from megatron_sas.model.huggingface import from_hf_config, from_hf_state, hf_architecture
from megatron_sas.run.directory import (
    HF_CONFIG,
    MODEL_CONFIG,
    MODEL_WEIGHTS,
    OPTIMIZER_PREFIX,
    STATE,
    TOKENIZER_DIRECTORY,
    find_model,
    is_checkpoint,
    step_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = "megatron_sas checkpoint"
VERSION = 1
HF_STEP = "megatron_sas_step"
"""In config.json, where transformers keeps what it does not know, also when it saves again."""
CONVERTED_STEP = "converted_step"
"""In the state of a checkpoint that was made of an export."""


def load_model(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[MaskedLM | ForeignModel, PreTrainedTokenizerBase]:
    """The model at `path` in evaluation mode, and its tokenizer.

    Args:
        path: a training checkpoint, a run directory (newest checkpoint), or a Hugging Face directory. A masked LM in
            one whose architecture is none of ours is computed by transformers (`model/foreign.py`).

    Raises:
        InputError: none of these, or the files do not fit each other.
    """
    path = find_model(path)
    if not is_checkpoint(path) and hf_architecture(_read_json(path / HF_CONFIG)) not in ARCHITECTURES:
        model, tokenizer_path = load_foreign(path), path
    else:
        config, state, tokenizer_path = read_model(path)
        model = build_model(config)
        load_state(model, state, where=str(path))
    tokenizer = read_tokenizer(tokenizer_path)
    if len(tokenizer) > model.config.vocab_size:
        raise InputError(
            f"{tokenizer_path}: the tokenizer has {len(tokenizer)} entries but the model only "
            f"{model.config.vocab_size}; they do not belong together"
        )
    return model.to(device=device, dtype=dtype).eval(), tokenizer


def read_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer at `path`, as `read_model` returns it.

    Raises:
        InputError: there is none that can be used, or a checkpoint's does something else than when it was written.
    """
    tokenizer = load_tokenizer(path)
    state = path.parent / STATE
    if path.name == TOKENIZER_DIRECTORY and state.is_file():
        recorded = _read_json(state).get("tokenizer")  # earlier versions recorded none
        if recorded is not None and recorded["digest"] != tokenizer_digest(tokenizer):
            raise InputError(
                f"{path}: does not cut texts as when the checkpoint was written; use the versions of transformers and "
                f"tokenizers of then ({STATE} names them)"
            )
    return tokenizer


def read_model(path: str | Path) -> tuple[ModelConfig, dict[str, Tensor], Path]:
    """Configuration, our float32 state dict, and where the tokenizer is. See `load_model`."""
    path = find_model(path)
    return read_checkpoint(path) if is_checkpoint(path) else (*_read_hf(path), path)


def model_step(path: Path) -> int | None:
    """Updates before a model: what a checkpoint or an export records, else a snapshot's name says; None: unknown.

    `path` is a model's own directory. Weights that were converted keep their step, though a run from them begins at 0.
    """
    recorded = None
    if (path / STATE).is_file():
        state = _read_json(path / STATE)
        recorded = state.get(CONVERTED_STEP, state.get("step"))
    elif (path / HF_CONFIG).is_file():
        recorded = _read_json(path / HF_CONFIG).get(HF_STEP)
    if recorded is not None:
        if type(recorded) is not int or recorded < 0:
            raise InputError(f"{path}: records {recorded!r} as its step, not a whole number; correct or remove it")
        return recorded
    return step_of(path.resolve())


def read_checkpoint(path: Path) -> tuple[ModelConfig, dict[str, Tensor], Path]:
    """`read_model` for the directory of one training checkpoint; all files but the optimizer's are verified."""
    verify_checkpoint(path, with_optimizer=False)
    return read_model_config(path / MODEL_CONFIG), read_weights(path / MODEL_WEIGHTS), path / TOKENIZER_DIRECTORY


def verify_checkpoint(path: Path, with_optimizer: bool = True) -> None:
    """`verify_manifest` for a training checkpoint, which must be of the version that this program reads."""
    manifest = read_manifest(path)
    if (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
        raise InputError(
            f"{path}: is a {manifest.get('format')!r} of version {manifest.get('version')}, this program reads a "
            f"{FORMAT!r} of version {VERSION}; use another checkpoint"
        )
    names = set(manifest["files"])
    present = {name for name in names if name.startswith(OPTIMIZER_PREFIX)}
    sizes = {int(match[1]) for name in present if (match := re.search(r"-of-(\d+)\.", name))}
    shards = [optimizer_shard(rank, size) for size in sorted(sizes) for rank in range(size)]
    if absent := [shard for shard in shards if shard not in present]:
        raise InputError(f"{path}: was published without {', '.join(absent)}; use another checkpoint")
    verify_manifest(path, {MODEL_CONFIG, MODEL_WEIGHTS, STATE, *names} - (set() if with_optimizer else present))


def optimizer_shard(rank: int, world_size: int) -> str:
    """File name of one rank's share of the moments."""
    return f"{OPTIMIZER_PREFIX}{rank:05d}-of-{world_size:05d}.safetensors"


def write_weights(path: str | Path, tensors: dict[str, Tensor]) -> None:
    """Write contiguous tensors as safetensors. transformers 4 refuses a file that does not say that it is PyTorch's.

    Raises:
        OSError: it cannot be written, for which safetensors has an error of its own.
    """
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(errno.EIO, first_line(error), str(path)) from error
    obey_umask(path)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, with a one-line error when it is none."""
    try:
        return load_file(path)
    except (SafetensorError, FileNotFoundError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"is damaged ({error})"
        raise InputError(f"{path}: {reason}; copy the model anew") from None


def write_model_config(path: str | Path, config: ModelConfig) -> None:
    """Write `config` as JSON."""
    write_json_atomic(path, model_values(config))


def model_values(config: ModelConfig) -> dict[str, Any]:
    """A configuration as JSON values; the architecture is among them unless it is the default, as in earlier files."""
    name = {} if config.architecture == DEFAULT else {"architecture": config.architecture}
    return name | asdict(config)


def read_model_config(path: str | Path) -> ModelConfig:
    """Read what `write_model_config` wrote, also in earlier versions, which had pre-LN models besides.

    Raises:
        InputError: it is no configuration of this program, or that of a pre-LN model.
    """
    values = _read_json(Path(path))
    if values.pop("norm_placement", "post") != "post":
        raise InputError(f"{path}: is of a pre-LN model, which only earlier versions read")
    name = values.pop("architecture", DEFAULT)
    if name not in ARCHITECTURES:
        raise InputError(f"{path}: is of architecture {name!r}; this program has {', '.join(ARCHITECTURES)}")
    try:
        return ARCHITECTURES[name].CONFIG(**values)
    except TypeError as error:
        raise InputError(f"{path}: is not a configuration of this program ({error})") from None


def load_state(model: MaskedLM, state: dict[str, Tensor], where: str) -> None:
    """`model.load_state_dict`, with a one-line error."""
    own = model.state_dict()
    wrong = sorted(
        n for n in own.keys() | state.keys() if n not in own or n not in state or own[n].shape != state[n].shape
    )
    if wrong:
        raise InputError(f"{where}: weights do not fit the configured model (e.g. {wrong[0]})")
    model.load_state_dict(state)


def architecture_differences(found: ModelConfig, wanted: ModelConfig) -> list[str]:
    """What keeps weights of architecture `found` from being used in `wanted`; dropout and kernels may differ."""
    if found.architecture != wanted.architecture:
        return [f"architecture {found.architecture} instead of {wanted.architecture}"]
    return [
        f"{name} {getattr(found, name)} instead of {getattr(wanted, name)}"
        for name in wanted.weights_depend_on
        if getattr(found, name) != getattr(wanted, name)
    ]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise InputError(f"{path}: does not hold a JSON object; the model is damaged")
    return values


def _read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of a model in several files."""
    names = _read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise InputError(f"{index}: weight_map does not name the files of the weights; download the model again")
    state: dict[str, Tensor] = {}
    for shard in sorted(set(names.values())):
        path = index.parent / Path(shard).name
        tensors = read_weights(path)
        if different := sorted(name for name in tensors.keys() & state.keys() if not tensors[name].equal(state[name])):
            raise InputError(f"{path}: has another {different[0]} than the files before it; download the model again")
        state |= tensors
    return state


def _read_hf(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    config = from_hf_config(_read_json(path / HF_CONFIG), str(path / HF_CONFIG))
    file = next((path / name for name in _READERS if (path / name).is_file()), None)
    if file is None:
        raise InputError(f"{path}: has a config.json but neither model.safetensors nor pytorch_model.bin")
    state = _READERS[file.name](file)
    try:
        return config, {n: t.float() for n, t in from_hf_state(state, config).items()}
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _read_pickled(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise InputError(f"{path}: cannot be read ({first_line(error)}); copy the model anew") from None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise InputError(f"{path}: does not hold tensors by name; save the model's state_dict alone in it")
    return state


_READERS = {
    "model.safetensors": read_weights,
    "model.safetensors.index.json": _read_shards,
    "pytorch_model.bin": _read_pickled,
}
"""The files in which a Hugging Face directory may have its weights, in the order in which they are looked for."""
