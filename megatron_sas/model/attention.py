"""Multi-head self-attention that returns its probabilities along dependency edges, and can show queries and keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from megatron_sas.kernels import dependency_attention, unsupported_reason, window_bounds
from megatron_sas.kernels.cpu_linear import Linear, linear
from megatron_sas.kernels.few_queries import attention_of, few_queries, takes_few_queries
from megatron_sas.kernels.reference import Window
from megatron_sas.model.config import ModelConfig

QueryKeyObserver = Callable[[Tensor, Tensor], None]


class QueriesKeys(NamedTuple):
    """What one layer's attention is made of, for terms of the objective."""

    q: Tensor  # (B, H, S, D)
    k: Tensor  # (B, H, S, D)
    window: Window  # None, or how many keys before and after its position a query sees
    backend: str = "auto"  # of the layer's attention


def at_positions(x: Tensor, positions: Tensor | None) -> Tensor:
    """`(M, C)` of `(B, S, C)` at flat indices into B·S, int64 `(M,)`; all of it for None."""
    return x if positions is None else x.flatten(0, 1)[positions]


class QueryKeyValue(Linear):
    """The projection to queries, keys and values: one matrix."""

    def forward(self, x: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Three `(B, S, C)` of `(B, S, C)`; with `rows`, int64 `(B, R)`, only the queries there, `(B, R, C)`."""
        size = x.shape[-1]
        if rows is None:
            return super().forward(x).split(size, dim=-1)
        some = x.gather(1, rows[..., None].expand(-1, -1, size))  # (B, R, C)
        weights = self.weight.split((size, 2 * size))
        biases = (None, None) if self.bias is None else self.bias.split((size, 2 * size))
        return linear(some, weights[0], biases[0]), *linear(x, weights[1], biases[1]).chunk(2, dim=-1)


class SelfAttention(nn.Module):
    """One projection to queries, keys and values, dependency attention, one projection back.

    `window` is None or how many keys before and after its position a query sees.
    """

    def __init__(self, config: ModelConfig, *, bias: bool = True, window: Window = None) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout_p = config.attention_dropout
        self.backend = config.attention_backend
        self.window = window
        self.qkv = QueryKeyValue(config.hidden_size, 3 * config.hidden_size, bias=bias)
        self.output = Linear(config.hidden_size, config.hidden_size, bias=bias)

    def forward(
        self,
        x: Tensor,
        heads: Tensor | None,
        seqlens: Tensor | None,
        observer: QueryKeyObserver | None = None,
        *positions: Tensor,
        queries_keys: bool = False,
        only_at: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, QueriesKeys | None]:
        """Output `(B, S, C)`, `to_head` and `to_dependent` `(B, H, S)` (None without `heads`), and if `queries_keys`
        is true queries and keys with their gradient.

        Heads `(B, sets, S)` give probabilities `(B, sets, H, S)`. With `only_at`, int64 `(M,)` flat indices into B·S,
        the output is `(M, C)`, at these positions. All else is the same.

        `observer` is called with queries and keys `(B, H, S, D)`: for evaluation, never while training. `positions` is
        what `project` needs besides.
        """
        # While training whether terms are measured must not show in what is rounded.
        needs_all = self.training or heads is not None or observer is not None or queries_keys
        if only_at is not None and not needs_all and takes_few_queries(self.backend, x):
            return self._few(x, seqlens, positions, only_at), None, None, None
        q, k, v = self.project(x, *positions)
        if observer is not None:
            observer(q, k)
        dropout_p, backend = self.dropout_p if self.training else 0.0, self.backend
        if not self.training and backend != "auto":
            # Chosen for training; evaluations have padding, and may run on another device.
            sets = heads.shape[1] if heads is not None and heads.dim() == 3 else 1
            asked = {"has_seqlens": seqlens is not None, "sets": sets, "window": window_bounds(self.window, x.shape[1])}
            if unsupported_reason(backend, q, dropout_p, **asked) is not None:
                backend = "auto"
        out, to_head, to_dependent = dependency_attention(
            q, k, v, heads, seqlens=seqlens, dropout_p=dropout_p, backend=backend, window=self.window
        )
        out = self.output(at_positions(out.transpose(1, 2).flatten(2), only_at))
        return out, to_head, to_dependent, QueriesKeys(q, k, self.window, backend) if queries_keys else None

    def _few(self, x: Tensor, seqlens: Tensor | None, positions: Sequence[Tensor], only_at: Tensor) -> Tensor:
        """Output `(M, C)`, where nobody asks for what other queries attend to."""
        few = few_queries(only_at, *x.shape[:2])
        q, k, v = self.project(x, *positions, rows=few.rows)
        out = attention_of(few.rows, q, k, v, seqlens=seqlens, window=self.window)  # (B, H, R, D)
        return self.output(at_positions(out.transpose(1, 2).flatten(2), few.places))

    def project(self, x: Tensor, *, rows: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `(B, H, S, D)` of `(B, S, C)`; with `rows`, int64 `(B, R)`, only queries there."""
        return tuple(part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv(x, rows))
