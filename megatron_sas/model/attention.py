"""Multi-head self-attention that returns its probabilities along dependency edges, and can show queries and keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from megatron_sas.kernels import dependency_attention, unsupported_reason
from megatron_sas.kernels.cpu_linear import Linear
from megatron_sas.model.config import BertConfig

QueryKeyObserver = Callable[[Tensor, Tensor], None]


class QueriesKeys(NamedTuple):
    """What one layer's attention is made of, for terms of the objective."""

    q: Tensor  # (B, H, S, D)
    k: Tensor  # (B, H, S, D)
    window: int | tuple[int, int] | None  # of local attention, as in `dependency_attention`


class SelfAttention(nn.Module):
    """One projection to queries, keys and values, dependency attention, one projection back."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout_p = config.attention_dropout
        self.backend = config.attention_backend
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size)
        self.output = Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        x: Tensor,
        heads: Tensor | None,
        seqlens: Tensor | None,
        observer: QueryKeyObserver | None = None,
        *,
        queries_keys: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, tuple[Tensor, Tensor] | None]:
        """Output `(B, S, C)`, `to_head` and `to_dependent` `(B, H, S)` (None without `heads`), and if `queries_keys`
        is true queries and keys `(B, H, S, D)` with their gradient.

        Heads `(B, sets, S)` give probabilities `(B, sets, H, S)`.

        `observer` is called with queries and keys `(B, H, S, D)`: for evaluation, never while training.
        """
        batch, seq, hidden = x.shape
        parts = self.qkv(x).split(hidden, dim=-1)
        q, k, v = (part.view(batch, seq, self.num_heads, -1).transpose(1, 2) for part in parts)  # (B, H, S, D)
        if observer is not None:
            observer(q, k)
        dropout_p, backend = self.dropout_p if self.training else 0.0, self.backend
        if not self.training and backend != "auto":
            # Chosen for training; evaluations have padding, and may run on another device.
            sets = heads.shape[1] if heads is not None and heads.dim() == 3 else 1
            if unsupported_reason(backend, q, dropout_p, has_seqlens=seqlens is not None, sets=sets) is not None:
                backend = "auto"
        out, to_head, to_dependent = dependency_attention(
            q, k, v, heads, seqlens=seqlens, dropout_p=dropout_p, backend=backend
        )
        out = self.output(out.transpose(1, 2).reshape(batch, seq, hidden))
        return out, to_head, to_dependent, (q, k) if queries_keys else None
