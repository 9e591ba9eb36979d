"""Reading a model from disk: a Hugging Face directory, a training checkpoint, or a run (its newest checkpoint)."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_sas.cli import InputError
from megatron_sas.data.tokenizer import load_tokenizer
from megatron_sas.files import write_json_atomic
from megatron_sas.manifest import verify_manifest
from megatron_sas.model.bert import Bert
from megatron_sas.model.config import BertConfig
from megatron_sas.model.huggingface import from_hf_config, from_hf_state

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODEL_CONFIG = "model.json"
MODEL_WEIGHTS = "model.safetensors"
TOKENIZER_DIRECTORY = "tokenizer"
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
    pointer = checkpoints_directory(path) / LATEST
    if pointer.is_file():
        path = pointer.parent / Path(pointer.read_text(encoding="utf-8").strip()).name
    if (path / MODEL_CONFIG).is_file():
        verify_manifest(path, [MODEL_CONFIG, MODEL_WEIGHTS])
        return read_model_config(path / MODEL_CONFIG), load_file(path / MODEL_WEIGHTS), path / TOKENIZER_DIRECTORY
    if (path / "config.json").is_file():
        return *_read_hf(path), path
    raise InputError(f"{path}: neither a Hugging Face model (config.json) nor a checkpoint ({MODEL_CONFIG})")


def write_model_config(path: str | Path, config: BertConfig) -> None:
    """Write `config` as JSON."""
    write_json_atomic(path, asdict(config))


def read_model_config(path: str | Path) -> BertConfig:
    """Read what `write_model_config` wrote."""
    return BertConfig(**_read_json(Path(path)))


def load_state(model: Bert, state: dict[str, Tensor], where: str) -> None:
    """`model.load_state_dict`, with a one-line error."""
    own = model.state_dict()
    wrong = sorted(
        n for n in own.keys() | state.keys() if n not in own or n not in state or own[n].shape != state[n].shape
    )
    if wrong:
        raise InputError(f"{where}: weights do not fit the configured model (e.g. {wrong[0]})")
    model.load_state_dict(state)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise InputError(f"{path}: is not JSON; the model is damaged") from None


def _read_hf(path: Path) -> tuple[BertConfig, dict[str, Tensor]]:
    config = from_hf_config(_read_json(path / "config.json"), str(path / "config.json"))
    if (path / "model.safetensors").is_file():
        state = load_file(path / "model.safetensors")
    elif (path / "model.safetensors.index.json").is_file():
        shards = sorted(set(_read_json(path / "model.safetensors.index.json")["weight_map"].values()))
        state = {name: tensor for shard in shards for name, tensor in load_file(path / Path(shard).name).items()}
    elif (path / "pytorch_model.bin").is_file():
        state = torch.load(path / "pytorch_model.bin", map_location="cpu", weights_only=True)
    else:
        raise InputError(f"{path}: has a config.json but neither model.safetensors nor pytorch_model.bin")
    try:
        return config, {n: t.float() for n, t in from_hf_state(state, config).items()}
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
