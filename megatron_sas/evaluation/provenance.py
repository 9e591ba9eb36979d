"""What an evaluation result must say about where it comes from."""

from __future__ import annotations

import platform
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import megatron_sas
from megatron_sas.cli import InputError
from megatron_sas.data.tokenizer import tokenizer_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from megatron_sas.model import Bert


def provenance(path: str | Path, model: Bert, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Model, tokenizer, device and versions as JSON values; `path` is where the model was loaded from."""
    import transformers

    device = next(model.parameters()).device
    return {
        "model": str(Path(path).resolve()),
        "model_config": asdict(model.config),
        "tokenizer": {
            "class": type(tokenizer).__name__,
            "vocab_size": len(tokenizer),
            "hash": tokenizer_hash(tokenizer),
        },
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type} ({platform.machine()})",
        "versions": {
            "megatron_sas": megatron_sas.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def choose_device(name: str | None) -> torch.device:
    """The named device; by default a GPU if there is one, else the CPU. Raises `InputError` if it is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise InputError(f"--device: {name!r} is not available here; use cpu or cuda[:N]") from None
    return device
