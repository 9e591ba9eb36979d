"""What an evaluation result must say about where it comes from."""

from __future__ import annotations

import platform
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import megatron_sas
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
