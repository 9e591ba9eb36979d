"""Weights and configurations of all architectures to and from transformers' classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from megatron_sas.core.cli import InputError
from megatron_sas.model.architectures import ARCHITECTURES, architecture_of
from megatron_sas.model.config import ModelConfig

HF_ARCHITECTURE = "megatron_sas_architecture"
"""In config.json, where transformers keeps what it does not know, also when it saves again."""


def hf_architecture(values: Mapping[str, Any]) -> Any:
    """The name of the architecture that a config.json describes: ours, or a `model_type` of transformers."""
    return values.get(HF_ARCHITECTURE, values.get("model_type"))


def to_hf_state(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our state dict as transformers', without the padded vocabulary rows and the tied decoder."""
    return architecture_of(config).to_hf_state(state, config)


def from_hf_state(hf_state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """transformers' state dict as ours; the vocabulary is padded with zero rows.

    Raises:
        InputError: parameters are missing, there are some that a masked LM does not have, or two that our model keeps
            as one differ.
    """
    return architecture_of(config).from_hf_state(hf_state, config)


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    """The fields of transformers' configuration (config.json) for ours.

    Several architectures may be one class of transformers with other settings: then `HF_ARCHITECTURE` says which it is.
    """
    values = architecture_of(config).to_hf_config(config)
    return values if config.architecture == values["model_type"] else values | {HF_ARCHITECTURE: config.architecture}


def from_hf_config(values: dict[str, Any], where: str) -> ModelConfig:
    """Our configuration from the fields of transformers' config.json found at `where` (for messages).

    Raises:
        InputError: an architecture that we do not have, or a value that ours does not.
    """
    kind = hf_architecture(values)
    if kind not in ARCHITECTURES:
        known = " and ".join(map(repr, ARCHITECTURES))
        raise InputError(f"{where}: model_type is {kind!r}; only {known} can be read")
    return ARCHITECTURES[kind].from_hf_config(values, where)
