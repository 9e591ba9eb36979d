"""What all architectures share: the forward of an encoder with a masked-LM head that is evaluated at given positions.

B sequences, S tokens, C hidden size, H attention heads, V vocabulary, M positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_sas.kernels.cpu_linear import Linear, linear
from megatron_sas.kernels.reference import Window, attention_probs
from megatron_sas.model.attention import QueriesKeys
from megatron_sas.model.config import ModelConfig

AttentionObserver = Callable[[int, Tensor], None]
QueryKeyObserver = Callable[[int, Tensor, Tensor, Window], None]


@dataclass
class ModelOutput:
    """What a forward returns; `to_head` and `to_dependent` have one `(B, H, S)` entry per layer.

    With several sets of edges these are `(B, sets, H, S)`.
    """

    hidden: Tensor  # (B, S, C), or (M, C) where it was asked for at M positions only
    logits: Tensor | None  # (M, padded V), -inf beyond V
    to_head: tuple[Tensor, ...]
    to_dependent: tuple[Tensor, ...]
    queries_keys: tuple[QueriesKeys, ...] = ()  # one per layer, if they were asked for

    def select(self, number: int) -> ModelOutput:
        """The same with the probabilities along one of several sets of edges."""
        to_head, to_dependent = (tuple(x[:, number] for x in layers) for layers in (self.to_head, self.to_dependent))
        return replace(self, to_head=to_head, to_dependent=to_dependent)


class LMHead(nn.Module):
    """Dense, GELU, LayerNorm and the decoder, whose matrix is the word embedding and which has a bias."""

    def __init__(self, config: ModelConfig, eps: float, bias: bool = True) -> None:
        super().__init__()
        self.vocab_size = config.vocab_size
        self.dense = Linear(config.hidden_size, config.hidden_size, bias=bias)
        self.norm = nn.LayerNorm(config.hidden_size, eps=eps, bias=bias)
        self.bias = nn.Parameter(torch.zeros(config.padded_vocab_size))

    def forward(self, hidden: Tensor, embedding: Tensor, *, apart: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """`(M, C)` to logits `(M, padded V)`, -inf beyond V (cutting the padding off would copy all of them).

        `apart`: the logits without the bias `(padded V,)`, which is -inf there, and the bias.
        """
        hidden = self.norm(F.gelu(self.dense(hidden)))
        padding = len(self.bias) - self.vocab_size
        bias = F.pad(self.bias[: self.vocab_size], (0, padding), value=float("-inf"))
        return (linear(hidden, embedding), bias) if apart else linear(hidden, embedding, bias)


class MaskedLM(nn.Module):
    """An encoder with its masked-LM head. A subclass makes the parts, by these names."""

    shows_queries, no_maps, takes_copies = True, None, True  # see `evaluation.batching.Encoder`
    embeddings: nn.Module  # with `word`, the word embedding
    layers: nn.ModuleList
    head: LMHead

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    def layer_arguments(self, input_ids: Tensor) -> Sequence[tuple[Any, ...]]:
        """Of every layer what it is given besides hidden states, edges, lengths and observer."""
        return [()] * len(self.layers)

    def finish(self, x: Tensor) -> Tensor:
        """What follows the last layer, `(…, C)`."""
        return x

    def forward(
        self,
        input_ids: Tensor,
        *,
        heads: Tensor | None = None,
        seqlens: Tensor | None = None,
        masked_positions: Tensor | None = None,
        only_at: Tensor | None = None,
        attention_observer: AttentionObserver | None = None,
        query_key_observer: QueryKeyObserver | None = None,
        queries_keys: bool = False,
        copies: Tensor | None = None,
    ) -> ModelOutput:
        """Run the encoder, and the head at `masked_positions`.

        The output's `hidden` is `(B, S, C)`, but with `masked_positions` or `only_at` `(M, C)`, at these positions in
        their order.

        Args:
            input_ids: int64 `(B, S)`.
            heads: int64 `(B, S)` dependency heads, -1 = none, or `(B, sets, S)`; None: no edge probabilities.
            seqlens: int64 `(B,)` valid lengths; None: all of S.
            masked_positions: int64 `(M,)`, flat indices into B·S; None: no logits.
            only_at: int64 `(M,)`, flat indices into B·S, for hidden states there without logits; not together with
                `masked_positions`.
            attention_observer: called once per layer with (layer, map `(B, H, S, S)` in float32, before dropout).
            query_key_observer: called once per layer with (layer, queries, keys, window), queries and keys
                `(B, H, S, D)` as their products are taken, the window None or (keys before, keys after).
            queries_keys: whether to return queries and keys of every layer, with their gradient.
            copies: int64 `(B, S)`, flat indices into R·S of `input_ids`, here `(R, S)`: the B sequences are made of the
                tokens there, each at its own place of a sequence. Embeddings and the first layer's queries, keys and
                values, which depend on token and place alone, are computed once for all that have them in common.
        """
        rows = only_at if masked_positions is None else masked_positions
        x = self.embeddings(input_ids)
        to_head, to_dependent, of_layers = [], [], []
        per_layer = zip(self.layers, self.config.windows, self.layer_arguments(input_ids), strict=True)
        for index, (layer, window, arguments) in enumerate(per_layer):
            observer = _observer_of(index, seqlens, window, attention_observer, query_key_observer)
            x, layer_to_head, layer_to_dependent, qk = layer(
                x, heads, seqlens, observer, *arguments, queries_keys=queries_keys,
                copies=None if index else copies,
                only_at=rows if index == len(self.layers) - 1 else None,
            )  # fmt: skip
            if layer_to_head is not None:
                to_head.append(layer_to_head)
                to_dependent.append(layer_to_dependent)
            if qk is not None:
                of_layers.append(qk)
        x = self.finish(x)
        logits = None if masked_positions is None else self.logits(x)
        return ModelOutput(x, logits, tuple(to_head), tuple(to_dependent), tuple(of_layers))

    def logits(self, hidden: Tensor, *, apart: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """The head's `(M, padded V)`, -inf beyond V, from hidden states `(M, C)`; or `apart` from their bias."""
        return self.head(hidden, self.embeddings.word.weight, apart=apart)


def _observer_of(
    layer: int,
    seqlens: Tensor | None,
    window: Window,
    of_maps: AttentionObserver | None,
    of_queries: QueryKeyObserver | None,
) -> Callable[[Tensor, Tensor], None] | None:
    """What a layer shows its queries and keys to; the map is formed only where somebody looks at it."""
    if of_maps is None and of_queries is None:
        return None

    def observe(q: Tensor, k: Tensor) -> None:
        if of_queries is not None:
            of_queries(layer, q, k, window)
        if of_maps is not None:
            of_maps(layer, attention_probs(q, k, seqlens, q.shape[-1] ** -0.5, window))

    return observe
