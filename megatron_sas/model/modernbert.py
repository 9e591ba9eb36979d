"""ModernBERT (Warner et al. 2024): its section of the configuration, its layers, and its exchange with transformers.

B sequences, S tokens, C hidden size, H attention heads, D head dimension, I intermediate size, V vocabulary. Norms come
before each block, positions are rotations of queries and keys (RoPE), the feed-forward block is gated (GeGLU), nothing
but the decoder has a bias, and in all but every n-th layer a token sees only those near it. Equal to
`transformers.ModernBertForMaskedLM` on the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron_sas.core.cli import InputError
from megatron_sas.kernels.cpu_linear import Linear
from megatron_sas.kernels.dropout import Dropout
from megatron_sas.kernels.reference import Window
from megatron_sas.model.attention import QueriesKeys, SelfAttention, at_positions, take_copies
from megatron_sas.model.base import LMHead, MaskedLM
from megatron_sas.model.config import Activations, ModelConfig
from megatron_sas.model.exchange import (
    check_names,
    check_values,
    cut_padding,
    pad_vocabulary,
    read_fields,
    without_copies,
)
from megatron_sas.model.section import KIND, AttentionBackend, InitFrom, ModelSection

TITLE = "ModernBERT"

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"num_layers": 2, "hidden_size": 128, "num_heads": 2, "intermediate_size": 320},
    "mini": {"num_layers": 4, "hidden_size": 256, "num_heads": 4, "intermediate_size": 704},
    "small": {"num_layers": 4, "hidden_size": 512, "num_heads": 8, "intermediate_size": 1344},
    "medium": {"num_layers": 8, "hidden_size": 512, "num_heads": 8, "intermediate_size": 1344},
    "base": {"num_layers": 22, "hidden_size": 768, "num_heads": 12, "intermediate_size": 1152},
    "large": {"num_layers": 28, "hidden_size": 1024, "num_heads": 16, "intermediate_size": 2624},
}
"""Named sizes: base and large of Warner et al. (2024). The others have layers, width and heads of the BERT of that name
and two thirds of its intermediate size, in multiples of 64. A GeGLU has three matrices, so they are as large."""


@dataclass(frozen=True)
class ModernBertConfig(ModelConfig):
    """Architecture of a ModernBERT masked language model. The defaults are ModernBERT-base."""

    num_layers: int = 22
    hidden_size: int = 768
    num_heads: int = 12
    intermediate_size: int = 1152
    vocab_size: int = 50368
    max_position_embeddings: int = 8192
    global_attn_every_n_layers: int = 3
    local_attention: int = 128
    global_rope_theta: float = 160_000.0
    local_rope_theta: float = 10_000.0
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    mlp_dropout: float = 0.0
    norm_eps: float = 1e-5
    initializer_range: float = 0.02
    initializer_cutoff_factor: float = 2.0
    pad_token_id: int = 50283
    attention_backend: str = "auto"

    architecture: ClassVar[str] = "modernbert"
    mlp_matrices: ClassVar[int] = 3
    weights_depend_on: ClassVar[tuple[str, ...]] = (
        *("num_layers", "hidden_size", "num_heads", "intermediate_size", "vocab_size", "global_attn_every_n_layers"),
        *("local_attention", "global_rope_theta", "local_rope_theta", "norm_eps", "pad_token_id"),
    )

    @property
    def windows(self) -> tuple[Window, ...]:
        """None for the first of every `global_attn_every_n_layers` layers, half of `local_attention` for the others."""
        local = (self.local_attention // 2,) * 2
        return tuple(local if i % self.global_attn_every_n_layers else None for i in range(self.num_layers))

    @property
    def activations(self) -> Activations:
        """Queries, keys, values 3C and rotated queries and keys 2C; attention output C; outputs of both norms 2C; the
        two halves of the inner layer 2I, GELU of one I, their product I. Inputs of both norms 2C."""
        c, inner = self.hidden_size, self.intermediate_size
        masks = (c if self.attention_dropout > 0 else 0) + (inner if self.mlp_dropout > 0 else 0)
        return Activations(5 * c + c + 2 * c + 4 * inner, 2 * c, masks, attention=6 * c)

    @property
    def embedding_dropout_masks(self) -> int:
        """C, or 0 without dropout."""
        return self.hidden_size if self.embedding_dropout > 0 else 0


class ModernBertSection(ModelSection):
    """A ModernBERT: a named size, and fields that replace its own."""

    SIZES = SIZES

    architecture: Literal["modernbert"] = Field("modernbert", description=KIND)
    global_attn_every_n_layers: int = Field(
        3,
        description="attention is global in the first of every N layers and local in the others; 1: global in all",
        ge=1,
    )
    local_attention: int = Field(
        128, description="tokens that local attention spans, half of them to either side", ge=2
    )
    global_rope_theta: float = Field(160_000.0, description="base of rotations in layers with global attention", gt=0)
    local_rope_theta: float = Field(10_000.0, description="base of rotations in layers with local attention", gt=0)
    embedding_dropout: float = Field(0.0, description="dropout of embeddings", ge=0, lt=1)
    attention_dropout: float = Field(
        0.0, description="dropout of attention probabilities and of attention's output; use 0 on CPU", ge=0, lt=1
    )
    mlp_dropout: float = Field(0.0, description="dropout inside the feed-forward block", ge=0, lt=1)
    attention_backend: AttentionBackend = "auto"
    init_from: InitFrom = None

    def faults(self) -> list[str]:
        """A rotation turns pairs of numbers."""
        faults, size = super().faults(), self.dimensions()
        if not faults and size["hidden_size"] // size["num_heads"] % 2:
            dim = size["hidden_size"] // size["num_heads"]
            faults.append(f"hidden_size: {size['hidden_size']} makes heads of {dim} numbers, and rotations need pairs")
        return faults

    def shape(self, vocab_size: int, pad_token_id: int) -> ModernBertConfig:
        """See `ModelSection`."""
        same = ("max_position_embeddings", "global_attn_every_n_layers", "local_attention", "global_rope_theta")
        same += ("local_rope_theta", "embedding_dropout", "attention_dropout", "mlp_dropout", "attention_backend")
        fields = self.dimensions() | {name: getattr(self, name) for name in same}
        return ModernBertConfig(**fields, vocab_size=vocab_size, pad_token_id=pad_token_id)


def _norm(config: ModernBertConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=False)


class Embeddings(nn.Module):
    """Word embeddings, LayerNorm, dropout; positions are in the attention."""

    def __init__(self, config: ModernBertConfig) -> None:
        super().__init__()
        self.word = nn.Embedding(config.padded_vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.norm = _norm(config)
        self.dropout = Dropout(config.embedding_dropout)

    def forward(self, input_ids: Tensor) -> Tensor:
        """`(B, S)` ids to `(B, S, C)`."""
        return self.dropout(self.norm(self.word(input_ids)))


class RotaryAttention(SelfAttention):
    """Attention between rotated queries and keys."""

    def project(
        self, x: Tensor, cos: Tensor, sin: Tensor, *, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `(B, H, S, D)` of `(B, S, C)`; cos and sin `(S, D / 2)` of the positions.

        With `rows`, int64 `(B, R)`, only the queries there.
        """
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)) for part in self.qkv(x, rows))  # (B, S, H, D)
        cos, sin = cos[:, None], sin[:, None]
        of_queries = (cos, sin) if rows is None else (cos[rows], sin[rows])  # (B, R, 1, D / 2)
        return rotate(q, *of_queries).transpose(1, 2), rotate(k, cos, sin).transpose(1, 2), v.transpose(1, 2)


def rotations(seq: int, dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine `(S, D / 2)`, float32, of the angles by which each pair of numbers is turned at each position."""
    frequencies = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
    angles = torch.arange(seq, dtype=torch.float32, device=device)[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x[i], x[i + D / 2]) of the last dimension, in float32; cos and sin broadcast to `(…, D / 2)`."""
    if x.dtype == cos.dtype and not torch.compiler.is_compiling():
        return _Rotate.apply(x, cos, sin)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class _Rotate(torch.autograd.Function):
    """Written once, and turned back in the backward; nothing is kept but the angles."""

    @staticmethod
    def forward(ctx, x, cos, sin):  # noqa: ANN001
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, -1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # noqa: ANN001
        return _turned(grad, *ctx.saved_tensors, 1.0), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    (first, second), (out_first, out_second) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=sign)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin, value=-sign)
    return out


class Layer(nn.Module):
    """One transformer layer: norms before both blocks, except that the first follows the norm of the embeddings."""

    def __init__(self, config: ModernBertConfig, index: int) -> None:
        super().__init__()
        self.attention_norm = _norm(config) if index else nn.Identity()
        self.attention = RotaryAttention(config, bias=False, window=config.windows[index])
        self.dropout = Dropout(config.attention_dropout)
        self.mlp_norm = _norm(config)
        self.up = Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.mlp_dropout = Dropout(config.mlp_dropout)

    def forward(
        self,
        x: Tensor,
        heads: Tensor | None,
        seqlens: Tensor | None,
        observer: Callable[[Tensor, Tensor], None] | None,
        cos: Tensor,
        sin: Tensor,
        *,
        queries_keys: bool,
        only_at: Tensor | None = None,
        copies: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, QueriesKeys | None]:
        """`(B, S, C)` to `(B, S, C)`, or `(M, C)` at the positions `only_at`, and what else `SelfAttention` returns."""
        attended, *handed_out = self.attention(
            self.attention_norm(x),
            heads,
            seqlens,
            observer,
            cos,
            sin,
            queries_keys=queries_keys,
            only_at=only_at,
            copies=copies,
        )
        x = at_positions(take_copies(x, copies), only_at) + self.dropout(attended)
        value, gate = self.up(self.mlp_norm(x)).chunk(2, dim=-1)  # (…, I)
        return x + self.down(self.mlp_dropout(F.gelu(value) * gate)), *handed_out


class ModernBert(MaskedLM):
    """A ModernBERT encoder with its masked-LM head."""

    def __init__(self, config: ModernBertConfig) -> None:
        super().__init__(config)
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_layers))
        self.final_norm = _norm(config)
        self.head = LMHead(config, config.norm_eps, bias=False)
        self._initialize()

    def _initialize(self) -> None:
        """transformers' initialisation: truncated normal, narrower where a block's result is added to the residual
        stream. Its padding row is not zero, and gets no gradient."""
        wide, word = self.config.initializer_range, self.embeddings.word.weight
        narrow, cutoff = wide / math.sqrt(2.0 * self.config.num_layers), self.config.initializer_cutoff_factor
        matrices = [(word, wide), (self.head.dense.weight, narrow)]
        for layer in self.layers:
            matrices += [(layer.attention.qkv.weight, wide), (layer.attention.output.weight, narrow)]
            matrices += [(layer.up.weight, wide), (layer.down.weight, narrow)]
        for weight, std in matrices:
            nn.init.trunc_normal_(weight, std=std, a=-cutoff * std, b=cutoff * std)
        with torch.no_grad():
            word[self.config.vocab_size :].zero_()

    def layer_arguments(self, input_ids: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        """The rotations of the positions, `(S, D / 2)`, by the theta of each layer."""
        config = self.config
        seq, dim, device = input_ids.shape[1], config.head_dim, input_ids.device
        thetas = [config.global_rope_theta if window is None else config.local_rope_theta for window in config.windows]
        by_theta = {theta: rotations(seq, dim, theta, device) for theta in dict.fromkeys(thetas)}
        return [by_theta[theta] for theta in thetas]

    def finish(self, x: Tensor) -> Tensor:
        """The last norm, `(…, C)`."""
        return self.final_norm(x)


SECTION, CONFIG, MODEL = ModernBertSection, ModernBertConfig, ModernBert
HF_CLASS = "ModernBertForMaskedLM"
HF_CLASSIFIER = "ModernBertForSequenceClassification"
NEW_IN_CLASSIFIER = ("classifier.",)
TAKES_TOKEN_TYPES = False

# Ours -> transformers'.
OUTSIDE_LAYERS = {
    "embeddings.word.weight": "model.embeddings.tok_embeddings.weight",
    "embeddings.norm.weight": "model.embeddings.norm.weight",
    "final_norm.weight": "model.final_norm.weight",
    "head.dense.weight": "head.dense.weight",
    "head.norm.weight": "head.norm.weight",
    "head.bias": "decoder.bias",
}
INSIDE_LAYER = {
    "attention_norm": "attn_norm",
    "attention.qkv": "attn.Wqkv",
    "attention.output": "attn.Wo",
    "mlp_norm": "mlp_norm",
    "up": "mlp.Wi",
    "down": "mlp.Wo",
}
TIED_DECODER = {"decoder.weight": "model.embeddings.tok_embeddings.weight"}
# Fields of config.json -> ours; whole numbers above 0, and numbers, from 0 to 1 or just above 0.
WHOLE_NUMBERS = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_heads",
    "intermediate_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "global_attn_every_n_layers": "global_attn_every_n_layers",
    "local_attention": "local_attention",
}
THETAS = {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"}
POSITIVE = ("initializer_cutoff_factor", *THETAS.values())
DROPOUTS = ("embedding_dropout", "attention_dropout", "mlp_dropout")
NUMBERS = {name: name for name in (*DROPOUTS, "norm_eps", "initializer_range", *POSITIVE)}
FIXED = {
    "hidden_activation": "gelu",
    "classifier_activation": "gelu",
    "norm_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
    "classifier_bias": False,
    "decoder_bias": True,
    "tie_word_embeddings": True,
}
"""What config.json may say only so."""


def _names(num_layers: int) -> dict[str, str]:
    """Every parameter, ours -> theirs."""
    names = dict(OUTSIDE_LAYERS)
    for layer in range(num_layers):
        for ours, theirs in INSIDE_LAYER.items():
            if layer or ours != "attention_norm":
                names[f"layers.{layer}.{ours}.weight"] = f"model.layers.{layer}.{theirs}.weight"
    return names


def to_hf_state(state: dict[str, Tensor], config: ModernBertConfig) -> dict[str, Tensor]:
    """Our state dict as transformers', without the padded vocabulary rows and the tied decoder."""
    return {theirs: cut_padding(ours, state[ours], config) for ours, theirs in _names(config.num_layers).items()}


def from_hf_state(hf_state: dict[str, Tensor], config: ModernBertConfig) -> dict[str, Tensor]:
    """transformers' state dict as ours; the vocabulary is padded with zero rows. Nothing is left out.

    Raises:
        InputError: parameters are missing, there are some that the masked LM does not have, the decoder differs from
            the embedding, or a GeGLU does not have two halves of `intermediate_size`.
    """
    hf_state, names = without_copies(hf_state, TIED_DECODER), _names(config.num_layers)
    check_names(hf_state, set(names.values()), set(), f"{HF_CLASS} with {config.num_layers} layers")
    for layer in range(config.num_layers):
        name = f"model.layers.{layer}.mlp.Wi.weight"
        if len(hf_state[name]) != 2 * config.intermediate_size:
            raise InputError(
                f"{name} has {len(hf_state[name])} rows, not two halves of intermediate_size {config.intermediate_size}"
            )
    state = {ours: hf_state[theirs] for ours, theirs in names.items()}
    pad_vocabulary(state, config)
    return state


def to_hf_config(config: ModernBertConfig) -> dict[str, Any]:
    """The fields of a `transformers.ModernBertConfig` (config.json): layers and thetas as 5 and as 4 writes them."""
    types = ["full_attention" if window is None else "sliding_attention" for window in config.windows]
    thetas = {kind: {"rope_type": "default", "rope_theta": getattr(config, ours)} for kind, ours in THETAS.items()}
    return {
        "architectures": [HF_CLASS],
        "model_type": "modernbert",
        **{field: getattr(config, ours) for field, ours in (WHOLE_NUMBERS | NUMBERS).items()},
        **FIXED,
        "layer_types": types,
        "rope_parameters": thetas,
        "pad_token_id": config.pad_token_id,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")),
        "torch_dtype": "float32",
    }


def from_hf_config(values: dict[str, Any], where: str) -> ModernBertConfig:
    """Our configuration from the fields of transformers' config.json found at `where` (for messages).

    Raises:
        InputError: biases, activations, orders of layers or kinds of rotations that our model does not have; a value
            that no model can have.
    """
    check_values(values, FIXED, where)
    values = values | _thetas(values, where)
    fields = read_fields(
        values, where, whole=WHOLE_NUMBERS, numbers=NUMBERS, positive=POSITIVE, defaults=ModernBertConfig
    )
    dim = fields["hidden_size"] // fields["num_heads"]
    if dim % 2:
        raise InputError(f"{where}: heads have {dim} numbers, and rotations need pairs; correct num_attention_heads")
    if (types := values.get("layer_types")) is not None:
        fields["global_attn_every_n_layers"] = _distance_of_global_layers(types, fields, where)
    return ModernBertConfig(**fields)


def _thetas(values: dict[str, Any], where: str) -> dict[str, Any]:
    """The two thetas, where config.json has them as transformers 5 writes them."""
    if values.get("rope_scaling") is not None:
        raise InputError(f"{where}: rope_scaling is {values['rope_scaling']!r}; only plain rotations can be read")
    found, parameters = {}, values.get("rope_parameters") or {}
    if not isinstance(parameters, dict) or not all(isinstance(parameters.get(kind) or {}, dict) for kind in parameters):
        raise InputError(f"{where}: rope_parameters is {parameters!r}; only those by kind of layer can be read")
    for kind, ours in THETAS.items():
        rope = parameters.get(kind) or {}
        if rope.get("rope_type", "default") != "default":
            raise InputError(f"{where}: rope_type is {rope['rope_type']!r}; only 'default' can be read")
        if "rope_theta" in rope:
            found[ours] = rope["rope_theta"]
    return found


def _distance_of_global_layers(types: list[str], fields: dict[str, Any], where: str) -> int:
    """n such that the first of every n layers is global and all others are local; what `fields` has if it fits."""
    layers = fields["num_layers"]
    for n in (fields["global_attn_every_n_layers"], *range(1, layers + 1)):
        if types == ["sliding_attention" if i % n else "full_attention" for i in range(layers)]:
            return n
    raise InputError(f"{where}: layer_types is not one full_attention in every n layers, beginning with the first")
