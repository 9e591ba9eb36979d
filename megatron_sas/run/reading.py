"""Reading a model from disk: a Hugging Face directory, a training checkpoint, or a run (its newest checkpoint)."""

from __future__ import annotations

import errno
import json
import pickle
import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_sas.core.cli import InputError, first_line
from megatron_sas.core.files import obey_umask, write_json_atomic
from megatron_sas.core.manifest import MANIFEST, read_manifest, verify_manifest
from megatron_sas.data.tokenizer import load_tokenizer
from megatron_sas.model.bert import Bert
from megatron_sas.model.config import BertConfig
from megatron_sas.model.huggingface import from_hf_config, from_hf_state

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = "megatron_sas checkpoint"
VERSION = 1
MODEL_CONFIG = "model.json"
MODEL_WEIGHTS = "model.safetensors"
TOKENIZER_DIRECTORY = "tokenizer"
STATE = "state.json"
OPTIMIZER_PREFIX = "optimizer-"
LATEST = "latest"


def checkpoints_directory(run_dir: str | Path) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(run_dir) / "checkpoints"


def load_model(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Bert, PreTrainedTokenizerBase]:
    """The model at `path` in evaluation mode, and its tokenizer.

    Args:
        path: a Hugging Face `BertForMaskedLM` directory, a training checkpoint, or a run directory (newest checkpoint).

    Raises:
        InputError: none of these, or the files do not fit each other.
    """
    config, state, tokenizer_path = read_model(path)
    tokenizer = load_tokenizer(tokenizer_path)
    if len(tokenizer) > config.vocab_size:
        raise InputError(
            f"{tokenizer_path}: the tokenizer has {len(tokenizer)} entries but the model only {config.vocab_size}; "
            "they do not belong together"
        )
    model = Bert(config)
    load_state(model, state, where=str(path))
    return model.to(device=device, dtype=dtype).eval(), tokenizer


def read_model(path: str | Path) -> tuple[BertConfig, dict[str, Tensor], Path]:
    """Configuration, our float32 state dict, and where the tokenizer is. See `load_model`."""
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path}: no such directory; give a Hugging Face directory or a training checkpoint")
    path = resolve_run(path)
    if is_checkpoint(path):
        return read_checkpoint(path)
    if (path / "config.json").is_file():
        return *_read_hf(path), path
    raise InputError(f"{path}: neither a Hugging Face model (config.json) nor a checkpoint ({MODEL_CONFIG})")


def resolve_run(path: Path) -> Path:
    """The checkpoint published last if `path` is a run directory, else `path` itself."""
    pointer = checkpoints_directory(path) / LATEST
    if not pointer.is_file():
        return path
    return pointer.parent / Path(pointer.read_text(encoding="utf-8").strip()).name


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a training checkpoint, whole or not."""
    return (path / MODEL_CONFIG).is_file() or (path / MANIFEST).is_file()


def read_checkpoint(path: Path) -> tuple[BertConfig, dict[str, Tensor], Path]:
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
    if absent := missing_shards(manifest["files"]):
        raise InputError(f"{path}: was published without {', '.join(absent)}; use another checkpoint")
    names = [name for name in manifest["files"] if with_optimizer or not name.startswith(OPTIMIZER_PREFIX)]
    verify_manifest(path, {MODEL_CONFIG, MODEL_WEIGHTS, STATE, *names})


def optimizer_shard(rank: int, world_size: int) -> str:
    """File name of one rank's share of the moments."""
    return f"{OPTIMIZER_PREFIX}{rank:05d}-of-{world_size:05d}.safetensors"


def missing_shards(names: Iterable[str]) -> list[str]:
    """The optimizer shards that should be beside those in `names`."""
    present = {name for name in names if name.startswith(OPTIMIZER_PREFIX)}
    sizes = {int(match[1]) for name in present if (match := re.search(r"-of-(\d+)\.", name))}
    return [shard for size in sorted(sizes) for r in range(size) if (shard := optimizer_shard(r, size)) not in present]


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


def write_model_config(path: str | Path, config: BertConfig) -> None:
    """Write `config` as JSON."""
    write_json_atomic(path, asdict(config))


def read_model_config(path: str | Path) -> BertConfig:
    """Read what `write_model_config` wrote."""
    try:
        return BertConfig(**_read_json(Path(path)))
    except TypeError as error:
        raise InputError(f"{path}: is not a configuration of this program ({error})") from None


def load_state(model: Bert, state: dict[str, Tensor], where: str) -> None:
    """`model.load_state_dict`, with a one-line error."""
    own = model.state_dict()
    wrong = sorted(
        n for n in own.keys() | state.keys() if n not in own or n not in state or own[n].shape != state[n].shape
    )
    if wrong:
        raise InputError(f"{where}: weights do not fit the configured model (e.g. {wrong[0]})")
    model.load_state_dict(state)


def architecture_differences(found: BertConfig, wanted: BertConfig) -> list[str]:
    """What keeps weights of architecture `found` from being used in `wanted`; dropout and kernels may differ."""
    names = (
        "num_layers",
        "hidden_size",
        "num_heads",
        "intermediate_size",
        "vocab_size",
        "max_position_embeddings",
        "type_vocab_size",
        "norm_placement",
        "layer_norm_eps",
        "pad_token_id",
    )
    return [
        f"{name} {getattr(found, name)} instead of {getattr(wanted, name)}"
        for name in names
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


def _shards(index: Path) -> list[str]:
    """The files of a model in several, by its index."""
    names = _read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise InputError(f"{index}: weight_map does not name the files of the weights; download the model again")
    return sorted(set(names.values()))


def _read_hf(path: Path) -> tuple[BertConfig, dict[str, Tensor]]:
    config = from_hf_config(_read_json(path / "config.json"), str(path / "config.json"))
    if (path / "model.safetensors").is_file():
        state = read_weights(path / "model.safetensors")
    elif (path / "model.safetensors.index.json").is_file():
        shards = _shards(path / "model.safetensors.index.json")
        state = {name: tensor for shard in shards for name, tensor in read_weights(path / Path(shard).name).items()}
    elif (path / "pytorch_model.bin").is_file():
        state = _read_pickled(path / "pytorch_model.bin")
    else:
        raise InputError(f"{path}: has a config.json but neither model.safetensors nor pytorch_model.bin")
    try:
        return config, {n: t.float() for n, t in from_hf_state(state, config).items()}
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _read_pickled(path: Path) -> dict[str, Tensor]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{path}: cannot be read ({reason}); copy the model anew") from None
