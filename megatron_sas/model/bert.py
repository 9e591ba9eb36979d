"""BERT (Devlin et al. 2019) with a masked-LM head that is evaluated at given positions only.

B sequences, S tokens, C hidden size, H attention heads, V vocabulary, M positions. LayerNorm comes after each block, as
in the paper. Equal to `transformers.BertForMaskedLM` on the same weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_sas.kernels.cpu_linear import Linear, linear
from megatron_sas.kernels.reference import attention_probs
from megatron_sas.model.attention import QueriesKeys, SelfAttention
from megatron_sas.model.config import BertConfig

AttentionObserver = Callable[[int, Tensor], None]
QueryKeyObserver = Callable[[int, Tensor, Tensor], None]


@dataclass
class BertOutput:
    """What a forward returns; `to_head` and `to_dependent` have one `(B, H, S)` entry per layer.

    With several sets of edges these are `(B, sets, H, S)`.
    """

    hidden: Tensor  # (B, S, C)
    logits: Tensor | None  # (M, padded V), -inf beyond V
    to_head: tuple[Tensor, ...]
    to_dependent: tuple[Tensor, ...]
    queries_keys: tuple[QueriesKeys, ...] = ()  # one per layer, if they were asked for

    def select(self, number: int) -> BertOutput:
        """The same with the probabilities along one of several sets of edges."""
        to_head, to_dependent = (tuple(x[:, number] for x in layers) for layers in (self.to_head, self.to_dependent))
        return replace(self, to_head=to_head, to_dependent=to_dependent)


class Embeddings(nn.Module):
    """Word + position + token-type embeddings, LayerNorm, dropout."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.word = nn.Embedding(config.padded_vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

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
        self.down = Linear(config.intermediate_size, config.hidden_size)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        x: Tensor,
        heads: Tensor | None,
        seqlens: Tensor | None,
        observer: Callable[[Tensor, Tensor], None] | None,
        *,
        queries_keys: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, tuple[Tensor, Tensor] | None]:
        """`(B, S, C)` to `(B, S, C)`, and what else `SelfAttention` returns."""
        attended, *handed_out = self.attention(x, heads, seqlens, observer, queries_keys=queries_keys)
        x = self.attention_norm(x + self.dropout(attended))
        x = self.mlp_norm(x + self.dropout(self.down(F.gelu(self.up(x)))))
        return x, *handed_out


class LMHead(nn.Module):
    """Dense, GELU, LayerNorm and the decoder, whose matrix is the word embedding."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.vocab_size = config.vocab_size
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.padded_vocab_size))

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        """`(M, C)` to logits `(M, padded V)`, -inf beyond V (cutting the padding off would copy all of them)."""
        hidden = self.norm(F.gelu(self.dense(hidden)))
        padding = len(self.bias) - self.vocab_size
        bias = F.pad(self.bias[: self.vocab_size], (0, padding), value=float("-inf"))
        return linear(hidden, embedding, bias)


class Bert(nn.Module):
    """A BERT encoder with its masked-LM head."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.head = LMHead(config)
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

    def forward(
        self,
        input_ids: Tensor,
        *,
        heads: Tensor | None = None,
        seqlens: Tensor | None = None,
        masked_positions: Tensor | None = None,
        attention_observer: AttentionObserver | None = None,
        query_key_observer: QueryKeyObserver | None = None,
        queries_keys: bool = False,
    ) -> BertOutput:
        """Run the encoder, and the head at `masked_positions`.

        Args:
            input_ids: int64 `(B, S)`.
            heads: int64 `(B, S)` dependency heads, -1 = none, or `(B, sets, S)`; None: no edge probabilities.
            seqlens: int64 `(B,)` valid lengths; None: all of S.
            masked_positions: int64 `(M,)`, flat indices into B·S; None: no logits.
            attention_observer: called once per layer with (layer, map `(B, H, S, S)` in float32, before dropout).
            query_key_observer: called once per layer with (layer, queries, keys), each `(B, H, S, D)`.
            queries_keys: whether to return queries and keys of every layer, with their gradient.
        """
        x = self.embeddings(input_ids)
        to_head, to_dependent, layers_queries_keys = [], [], []
        for index, layer in enumerate(self.layers):
            observer = _observer_of(index, seqlens, attention_observer, query_key_observer)
            x, layer_to_head, layer_to_dependent, qk = layer(x, heads, seqlens, observer, queries_keys=queries_keys)
            if layer_to_head is not None:
                to_head.append(layer_to_head)
                to_dependent.append(layer_to_dependent)
            if qk is not None:
                layers_queries_keys.append(QueriesKeys(*qk, window=None))
        logits = None
        if masked_positions is not None:
            logits = self.logits(x, masked_positions)
        return BertOutput(x, logits, tuple(to_head), tuple(to_dependent), tuple(layers_queries_keys))

    def logits(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """`(M, padded V)`, -inf beyond V, at `positions` `(M,)`, flat indices into the B·S rows of `(B, S, C)`."""
        return self.head(hidden.reshape(-1, hidden.shape[-1])[positions], self.embeddings.word.weight)


def _observer_of(
    layer: int, seqlens: Tensor | None, of_maps: AttentionObserver | None, of_queries: QueryKeyObserver | None
) -> Callable[[Tensor, Tensor], None] | None:
    """What a layer shows its queries and keys to; the map is formed only where somebody looks at it."""
    if of_maps is None and of_queries is None:
        return None

    def observe(q: Tensor, k: Tensor) -> None:
        if of_queries is not None:
            of_queries(layer, q, k)
        if of_maps is not None:
            of_maps(layer, attention_probs(q, k, seqlens, q.shape[-1] ** -0.5))

    return observe
