"""What an evaluation result must say about where it comes from."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import megatron_sas
from megatron_sas.core.files import sha256_file
from megatron_sas.data.tokenizer import tokenizer_identity
from megatron_sas.run.directory import MODEL_WEIGHTS
from megatron_sas.run.reading import model_step, model_values

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from megatron_sas.model.base import MaskedLM

WEIGHT_FILES = (MODEL_WEIGHTS, "model.safetensors.index.json", "pytorch_model.bin")  # in the order of `read_model`


def model_source(path: Path) -> dict[str, Any]:
    """Which model an evaluation is of: `model` (its directory), `model_step` (None if unknown) and `model_sha256`.

    `path` is a model's own directory, not a run's, whose newest checkpoint may change meanwhile (`newest_of_run`).
    """
    return {"model": str(path.resolve()), "model_step": model_step(path), "model_sha256": weights_sha256(path)}


def weights_sha256(path: Path) -> str | None:
    """SHA-256 of a model's weights file; of weights in shards, that of the shards' names and SHA-256. None: no weights.

    Raises:
        OSError, ValueError: a file cannot be read.
    """
    file = next((path / name for name in WEIGHT_FILES if (path / name).is_file()), None)
    if file is None or file.suffix != ".json":
        return file and sha256_file(file)
    shards = sorted(set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values()))
    lines = "".join(f"{name} {sha256_file(path / Path(name).name)}\n" for name in shards)
    return hashlib.sha256(lines.encode()).hexdigest()


def provenance(path: Path, model: MaskedLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Model, tokenizer, device and versions as JSON values; `path` as `model_source` takes it."""
    import transformers

    device = next(model.parameters()).device
    is_gpu = device.type == "cuda"
    return {
        **model_source(path),
        "model_config": model_values(model.config),
        "tokenizer": {"class": type(tokenizer).__name__, "vocab_size": len(tokenizer)}
        | asdict(tokenizer_identity(tokenizer)),
        "device": torch.cuda.get_device_name(device) if is_gpu else f"{device.type} ({platform.machine()})",
        "versions": {
            "megatron_sas": megatron_sas.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
