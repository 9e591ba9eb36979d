"""What the mappings to transformers' classes share: tied and padded weights, fields of config.json.

Names of weights and fields are transformers' unless something else is said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_sas.core.cli import InputError
from megatron_sas.model.config import ModelConfig

PADDED = ("embeddings.word.weight", "head.bias")
"""Our parameters with rows for the padded vocabulary, which transformers' models do not have."""


def cut_padding(name: str, value: Tensor, config: ModelConfig) -> Tensor:
    """Our parameter `name` without the rows of the padded vocabulary, contiguous."""
    return (value[: config.vocab_size] if name in PADDED else value).contiguous()


def pad_vocabulary(state: dict[str, Tensor], config: ModelConfig) -> None:
    """Append the zero rows of the padded vocabulary to our state dict, in place."""
    for name in PADDED:
        padding = torch.zeros(config.padded_vocab_size - config.vocab_size, *state[name].shape[1:])
        state[name] = torch.cat([state[name], padding.to(state[name].dtype)])


def without_copies(hf_state: Mapping[str, Tensor], tied: Mapping[str, str]) -> dict[str, Tensor]:
    """The state without the second copies of parameters that our models keep as one (`tied`: second to first name).

    A file may have either name of a tied parameter. transformers computes with the decoder's where both are there and
    differ, so taking the other one would be another model.

    Raises:
        InputError: both are there, and differ.
    """
    state = dict(hf_state)
    for name, tied_to in tied.items():
        second = state.pop(name, None)
        if second is not None and not torch.equal(second, state.setdefault(tied_to, second)):
            raise InputError(f"{name} differs from {tied_to}; this project's models tie them, so it cannot be read")
    return state


def check_names(hf_state: Mapping[str, Tensor], wanted: set[str], unused: set[str], what: str) -> None:
    """Raise `InputError` unless the state has all of `wanted` and besides only names in `unused`."""
    missing = sorted(wanted - set(hf_state))
    unknown = sorted(set(hf_state) - wanted - unused)
    if missing or unknown:
        raise InputError(
            f"not the weights of a {what}: missing {missing[:3] or 'nothing'}, unexpected {unknown[:3] or 'nothing'}"
        )


def check_values(values: Mapping[str, Any], accepted: Mapping[str, Any], where: str) -> None:
    """Raise `InputError` if a field of config.json at `where` has another value than the one that can be read."""
    for field, value in accepted.items():
        if values.get(field, value) != value:
            raise InputError(f"{where}: {field} is {values[field]!r}; only {value!r} can be read")


def read_fields(
    values: Mapping[str, Any],
    where: str,
    *,
    whole: Mapping[str, str],
    numbers: Mapping[str, str],
    positive: Sequence[str] = (),
    defaults: type[ModelConfig],
) -> dict[str, Any]:
    """The fields of one of our configurations from those of config.json at `where`.

    Args:
        values: the fields of config.json.
        whole, numbers: by field of config.json ours, for whole numbers above 0 and for numbers from 0 to 1.
        positive: those of `numbers` that may be anything above 0.
        defaults: class whose defaults hold where a field is missing.

    Raises:
        InputError: a value that no model can have.
    """
    fields = {ours: values.get(field, getattr(defaults, ours)) for field, ours in {**whole, **numbers}.items()}
    pad = values.get("pad_token_id", defaults.pad_token_id)
    fields["pad_token_id"] = 0 if pad is None else pad
    for field, ours in whole.items():
        if type(fields[ours]) is not int or fields[ours] < 1:
            raise InputError(f"{where}: {field} is {fields[ours]!r}, not a whole number above 0; correct it")
    for field, ours in numbers.items():
        number = type(fields[ours]) in (int, float)
        if field in positive and not (number and 0 < fields[ours] < float("inf")):
            raise InputError(f"{where}: {field} is {fields[ours]!r}, not a number above 0; correct it")
        if field not in positive and not (number and 0 <= fields[ours] <= 1):
            raise InputError(f"{where}: {field} is {fields[ours]!r}, not a number from 0 to 1; correct it")
    size, heads, pad, vocab = (fields[n] for n in ("hidden_size", "num_heads", "pad_token_id", "vocab_size"))
    if size % heads:
        raise InputError(f"{where}: num_attention_heads is {heads}, no divisor of hidden_size {size}; correct it")
    if type(pad) is not int or not 0 <= pad < vocab:
        raise InputError(f"{where}: pad_token_id is {pad!r}, not an id from 0 to {vocab - 1}; correct it")
    return fields
