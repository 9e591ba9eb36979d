"""Weights and configuration to and from `transformers.BertForMaskedLM`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_sas.core.cli import InputError
from megatron_sas.model.config import BertConfig

# Ours -> Hugging Face's. The query, key and value projections, which we keep as one, are handled separately.
OUTSIDE_LAYERS = {
    "embeddings.word.weight": "bert.embeddings.word_embeddings.weight",
    "embeddings.position.weight": "bert.embeddings.position_embeddings.weight",
    "embeddings.token_type.weight": "bert.embeddings.token_type_embeddings.weight",
    "embeddings.norm.weight": "bert.embeddings.LayerNorm.weight",
    "embeddings.norm.bias": "bert.embeddings.LayerNorm.bias",
    "head.dense.weight": "cls.predictions.transform.dense.weight",
    "head.dense.bias": "cls.predictions.transform.dense.bias",
    "head.norm.weight": "cls.predictions.transform.LayerNorm.weight",
    "head.norm.bias": "cls.predictions.transform.LayerNorm.bias",
    "head.bias": "cls.predictions.bias",
}
INSIDE_LAYER = {
    "attention.output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
# Fields of config.json -> ours; whole numbers above 0, and numbers from 0 to 1.
WHOLE_NUMBERS = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_heads",
    "intermediate_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "type_vocab_size": "type_vocab_size",
}
NUMBERS = {
    "hidden_dropout_prob": "hidden_dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "layer_norm_eps": "layer_norm_eps",
    "initializer_range": "initializer_range",
}
PADDED = ("embeddings.word.weight", "head.bias")
TIED_DECODER = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
POSITION_IDS = "bert.embeddings.position_ids"
UNUSED_BY_MASKED_LM = {
    "bert.pooler.dense.weight",
    "bert.pooler.dense.bias",
    "cls.seq_relationship.weight",
    "cls.seq_relationship.bias",
}


def _names(num_layers: int) -> dict[str, str]:
    """Every parameter that maps one to one, ours -> theirs."""
    names = dict(OUTSIDE_LAYERS)
    for layer in range(num_layers):
        for ours, theirs in INSIDE_LAYER.items():
            for kind in ("weight", "bias"):
                names[f"layers.{layer}.{ours}.{kind}"] = f"bert.encoder.layer.{layer}.{theirs}.{kind}"
    return names


def to_hf_state(state: dict[str, Tensor], config: BertConfig) -> dict[str, Tensor]:
    """Our state dict as Hugging Face's, without the padded vocabulary rows and the tied decoder."""
    result = {}
    for ours, theirs in _names(config.num_layers).items():
        value = state[ours]
        result[theirs] = (value[: config.vocab_size] if ours in PADDED else value).contiguous()
    for layer in range(config.num_layers):
        for kind in ("weight", "bias"):
            parts = state[f"layers.{layer}.attention.qkv.{kind}"].chunk(3)
            for name, part in zip(("query", "key", "value"), parts, strict=True):
                result[f"bert.encoder.layer.{layer}.attention.self.{name}.{kind}"] = part.contiguous()
    return result


def from_hf_state(hf_state: dict[str, Tensor], config: BertConfig) -> dict[str, Tensor]:
    """Hugging Face's state dict as ours; the vocabulary is padded with zero rows.

    `UNUSED_BY_MASKED_LM`, which no masked LM computes with, is left out. Nothing else is.

    Raises:
        InputError: parameters are missing, there are some that a masked LM does not have, or two that our model keeps
            as one differ.
    """
    hf_state = _tie(_rename_layer_norms(hf_state))
    names = _names(config.num_layers)
    qkv = {
        f"layers.{layer}.attention.qkv.{kind}": [
            f"bert.encoder.layer.{layer}.attention.self.{name}.{kind}" for name in ("query", "key", "value")
        ]
        for layer in range(config.num_layers)
        for kind in ("weight", "bias")
    }
    wanted = set(names.values()) | {name for group in qkv.values() for name in group}
    missing = sorted(wanted - set(hf_state))
    unknown = sorted(set(hf_state) - wanted - UNUSED_BY_MASKED_LM)
    if missing or unknown:
        raise InputError(
            f"not the weights of a BertForMaskedLM with {config.num_layers} layers: "
            f"missing {missing[:3] or 'nothing'}, unexpected {unknown[:3] or 'nothing'}"
        )
    state = {ours: hf_state[theirs] for ours, theirs in names.items()}
    for name in PADDED:
        padding = torch.zeros(config.padded_vocab_size - config.vocab_size, *state[name].shape[1:])
        state[name] = torch.cat([state[name], padding.to(state[name].dtype)])
    for ours, theirs in qkv.items():
        state[ours] = torch.cat([hf_state[name] for name in theirs])
    return state


def _rename_layer_norms(hf_state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Checkpoints converted from TensorFlow name the LayerNorm parameters gamma and beta; one of them may have both."""
    result: dict[str, Tensor] = {}
    for old, tensor in hf_state.items():
        name = old.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        if name in result and not torch.equal(result[name], tensor):
            raise InputError(f"{name} is there under two names, with different values; remove the wrong one")
        result[name] = tensor
    return result


def _tie(hf_state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state without second copies: of the decoder, which our models tie, and of the numbers of the positions.

    A file may have either name of a tied parameter. transformers computes with the decoder's where both are there and
    differ, so taking the other one would be another model.
    """
    state = dict(hf_state)
    for name, tied_to in TIED_DECODER.items():
        decoder = state.pop(name, None)
        if decoder is not None and not torch.equal(decoder, state.setdefault(tied_to, decoder)):
            raise InputError(f"{name} differs from {tied_to}; this project's models tie them, so it cannot be read")
    positions = state.pop(POSITION_IDS, None)
    if positions is not None and positions.flatten().tolist() != list(range(positions.numel())):
        raise InputError(
            f"{POSITION_IDS} is not 0, 1, 2, …; this project's models count positions so, so it cannot be read"
        )
    return state


def to_hf_config(config: BertConfig) -> dict[str, Any]:
    """The fields of a Hugging Face `BertConfig` (config.json) for our configuration."""
    return {
        "architectures": ["BertForMaskedLM"],
        "model_type": "bert",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "hidden_act": "gelu",
        "hidden_dropout_prob": config.hidden_dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "max_position_embeddings": config.max_position_embeddings,
        "type_vocab_size": config.type_vocab_size,
        "initializer_range": config.initializer_range,
        "layer_norm_eps": config.layer_norm_eps,
        "pad_token_id": config.pad_token_id,
        "position_embedding_type": "absolute",
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }


def from_hf_config(values: dict[str, Any], where: str) -> BertConfig:
    """Our configuration from the fields of a Hugging Face config.json found at `where` (for messages).

    Raises:
        InputError: another architecture, activation or kind of position embedding; a value that no model can have.
    """
    if values.get("model_type") != "bert":
        raise InputError(f"{where}: model_type is {values.get('model_type')!r}; only 'bert' can be read")
    for field, accepted in (
        ("hidden_act", ("gelu",)),
        ("position_embedding_type", ("absolute",)),
        ("is_decoder", (False,)),
        ("tie_word_embeddings", (True,)),
    ):
        if values.get(field, accepted[0]) not in accepted:
            raise InputError(f"{where}: {field} is {values[field]!r}; only {accepted[0]!r} can be read")
    fields = {ours: values.get(field, getattr(BertConfig, ours)) for field, ours in (WHOLE_NUMBERS | NUMBERS).items()}
    fields["pad_token_id"] = 0 if values.get("pad_token_id") is None else values["pad_token_id"]
    for field, ours in WHOLE_NUMBERS.items():
        if type(fields[ours]) is not int or fields[ours] < 1:
            raise InputError(f"{where}: {field} is {fields[ours]!r}, not a whole number above 0; correct it")
    for field, ours in NUMBERS.items():
        if type(fields[ours]) not in (int, float) or not 0 <= fields[ours] <= 1:
            raise InputError(f"{where}: {field} is {fields[ours]!r}, not a number from 0 to 1; correct it")
    size, heads, pad, vocab = (fields[n] for n in ("hidden_size", "num_heads", "pad_token_id", "vocab_size"))
    if size % heads:
        raise InputError(f"{where}: num_attention_heads is {heads}, no divisor of hidden_size {size}; correct it")
    if type(pad) is not int or not 0 <= pad < vocab:
        raise InputError(f"{where}: pad_token_id is {pad!r}, not an id from 0 to {vocab - 1}; correct it")
    return BertConfig(**fields)
