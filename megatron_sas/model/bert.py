"""BERT (Devlin et al. 2019): its section of the configuration, its layers, and its exchange with transformers.

B sequences, S tokens, C hidden size, H attention heads, V vocabulary. LayerNorm comes after each block, as in the
paper. Equal to `transformers.BertForMaskedLM` on the same weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from megatron_sas.core.cli import InputError
from megatron_sas.kernels.cpu_linear import Linear
from megatron_sas.kernels.dropout import Dropout
from megatron_sas.model.attention import QueriesKeys, SelfAttention, at_positions, take_copies
from megatron_sas.model.base import LMHead, MaskedLM
from megatron_sas.model.config import SIZES, BertConfig
from megatron_sas.model.exchange import (
    check_names,
    check_values,
    cut_padding,
    pad_vocabulary,
    read_fields,
    without_copies,
)
from megatron_sas.model.section import KIND, AttentionBackend, InitFrom, ModelSection

TITLE = "BERT"


class BertSection(ModelSection):
    """The architecture: a named size, and fields that replace its own."""

    SIZES = SIZES

    architecture: Literal["bert"] = Field("bert", description=KIND)
    hidden_dropout: float = Field(0.1, description="dropout of embeddings and block outputs", ge=0, lt=1)
    attention_dropout: float = Field(0.1, description="dropout of attention probabilities; use 0 on CPU", ge=0, lt=1)
    attention_backend: AttentionBackend = "auto"
    init_from: InitFrom = None

    def shape(self, vocab_size: int, pad_token_id: int) -> BertConfig:
        """See `ModelSection`."""
        return BertConfig(
            **self.dimensions(),
            vocab_size=vocab_size,
            pad_token_id=pad_token_id,
            max_position_embeddings=self.max_position_embeddings,
            hidden_dropout=self.hidden_dropout,
            attention_dropout=self.attention_dropout,
            attention_backend=self.attention_backend,
        )


class Embeddings(nn.Module):
    """Word + position + token-type embeddings, LayerNorm, dropout."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.word = nn.Embedding(config.padded_vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout)

    def forward(self, input_ids: Tensor) -> Tensor:
        """`(B, S)` ids to `(B, S, C)`; every token has type 0 (masked LM without sentence pairs)."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        types = torch.zeros(1, dtype=torch.int64, device=input_ids.device)
        return self.dropout(self.norm(self.word(input_ids) + self.position(positions) + self.token_type(types)))


class Layer(nn.Module):
    """One transformer layer, post-LN."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = SelfAttention(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.up = Linear(config.hidden_size, config.intermediate_size)
        self.activation = F.gelu
        self.down = Linear(config.intermediate_size, config.hidden_size)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout)

    def forward(
        self,
        x: Tensor,
        heads: Tensor | None,
        seqlens: Tensor | None,
        observer: Callable[[Tensor, Tensor], None] | None,
        *,
        queries_keys: bool,
        only_at: Tensor | None = None,
        copies: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, QueriesKeys | None]:
        """`(B, S, C)` to `(B, S, C)`, or `(M, C)` at the positions `only_at`, and what else `SelfAttention` returns."""
        attended, *handed_out = self.attention(
            x, heads, seqlens, observer, queries_keys=queries_keys, only_at=only_at, copies=copies
        )
        x = self.attention_norm(at_positions(take_copies(x, copies), only_at) + self.dropout(attended))
        x = self.mlp_norm(x + self.dropout(self.down(self.activation(self.up(x)))))
        return x, *handed_out


class Bert(MaskedLM):
    """A BERT encoder with its masked-LM head."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.head = LMHead(config, config.layer_norm_eps)
        self.apply(self._initialize)

    def _initialize(self, module: nn.Module) -> None:
        """Hugging Face's initialisation: normal weights and embeddings, zero biases, zero padding row."""
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if module.padding_idx is not None:
                with torch.no_grad():
                    module.weight[module.padding_idx].zero_()
                    module.weight[self.config.vocab_size :].zero_()


SECTION, CONFIG, MODEL = BertSection, BertConfig, Bert
HF_CLASS = "BertForMaskedLM"
HF_CLASSIFIER = "BertForSequenceClassification"
NEW_IN_CLASSIFIER = ("bert.pooler.", "classifier.")
TAKES_TOKEN_TYPES = True

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
        result[theirs] = cut_padding(ours, state[ours], config)
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
    hf_state = _without_copies(_rename_layer_norms(hf_state))
    names = _names(config.num_layers)
    qkv = {
        f"layers.{layer}.attention.qkv.{kind}": [
            f"bert.encoder.layer.{layer}.attention.self.{name}.{kind}" for name in ("query", "key", "value")
        ]
        for layer in range(config.num_layers)
        for kind in ("weight", "bias")
    }
    wanted = set(names.values()) | {name for group in qkv.values() for name in group}
    check_names(hf_state, wanted, UNUSED_BY_MASKED_LM, f"BertForMaskedLM with {config.num_layers} layers")
    state = {ours: hf_state[theirs] for ours, theirs in names.items()}
    pad_vocabulary(state, config)
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


def _without_copies(hf_state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state without second copies: of the decoder, which our models tie, and of the numbers of the positions."""
    state = without_copies(hf_state, TIED_DECODER)
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
        InputError: another activation or kind of position embedding; a value that no model can have.
    """
    accepted = {
        "hidden_act": "gelu",
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "tie_word_embeddings": True,
    }
    check_values(values, accepted, where)
    fields = read_fields(values, where, whole=WHOLE_NUMBERS, numbers=NUMBERS, defaults=BertConfig)
    return BertConfig(**fields)
