"""Dependency attention: one function, one signature, and the backends behind it.

The SAS regularizer needs two entries per token of each attention map: the probability with which a dependent attends
to its head, and the one with which the head attends to its dependent. A flash kernel never forms the map, but it
returns `LSE_i = log Σ_j exp(s_ij)`, from which an entry costs one dot product: `p_ij = exp(s_ij - LSE_i)`. `edges.py`
has the forward and backward of these entries; the backends differ in how they compute the attention around them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_sas.kernels.backends import BACKENDS, choose_backend, unsupported_reason
from megatron_sas.kernels.reference import Window

INTEGER_TYPES = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)


def dependency_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: Tensor | None,
    *,
    seqlens: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    backend: str = "auto",
    window: int | tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Scaled dot-product attention that also returns the attention probabilities along dependency edges.

    Args:
        q, k, v: `(batch, heads, seq, head_dim)`, one floating dtype and device.
        heads: integer `(batch, seq)`; `heads[b, i] = j` means that token i depends on token j, and any value outside
            `[0, seqlens[b])` that there is no edge. Or `(batch, sets, seq)`, several such sets of edges over the same
            attention. None: plain attention, and None for both probabilities.
        seqlens: integer `(batch,)`, valid tokens per sequence; later key columns get no attention, edges from or to
            later tokens do not count, and later rows of `out` are finite but unspecified. None: all valid.
        dropout_p: probability with which attention probabilities are dropped (inverted dropout); drawn from torch's
            default generator, the same in forward and backward.
        scale: factor on the scores; 1/sqrt(head_dim) by default.
        backend: "auto", the first that can of those for the device, or one of `BACKENDS`.
        window: attention is local: a query at i sees the keys at j with |i - j| <= window // 2, as in a ModernBERT of
            transformers whose `local_attention` this is. Or (before, after): i - before <= j <= i + after. None: all.
            An edge's probability in a direction that the window hides is 0 without gradient.

    Returns:
        `out` like q; `to_head[b, h, i]` = α[i, heads[i]] and `to_dependent[b, h, i]` = α[heads[i], i], both float32
        (float64 for float64 inputs) `(batch, heads, seq)`, before dropout, 0 without gradient where there is no edge;
        `(batch, sets, heads, seq)` for several sets. All three are differentiable in q, k and v.

    Raises:
        ValueError: shapes or dtypes do not fit, or the backend cannot take such inputs.
    """
    _check(q, k, v, heads, seqlens, dropout_p, backend)
    sets = heads.shape[1] if heads is not None and heads.dim() == 3 else 1
    asked = {"has_seqlens": seqlens is not None, "sets": sets, "window": window_bounds(window, q.shape[2])}
    if backend == "auto":
        backend = choose_backend(q, dropout_p, **asked)
    elif (reason := unsupported_reason(backend, q, dropout_p, **asked)) is not None:
        raise ValueError(f"dependency_attention: backend {backend!r}: {reason}; choose 'auto'")
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    with torch.autocast(q.device.type, enabled=False):  # it would round float32 scores to bfloat16
        return BACKENDS[backend].run(q, k, v, heads, seqlens, dropout_p, scale, asked["window"])


def window_bounds(window: int | tuple[int, int] | None, seq: int) -> Window:
    """How many keys before and after it a query sees; None when these are all of the sequence."""
    if window is None:
        return None
    before, after = (window // 2, window // 2) if isinstance(window, int) else window
    if min(before, after) < 0:
        raise ValueError(f"dependency_attention: window must be a number or two of at least 0, not {window}")
    return None if min(before, after) >= seq - 1 else (before, after)


def _check(
    q: Tensor, k: Tensor, v: Tensor, heads: Tensor | None, seqlens: Tensor | None, dropout_p: float, backend: str
) -> None:
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(
            f"dependency_attention: unknown backend {backend!r}; choose one of {', '.join(('auto', *BACKENDS))}"
        )
    if q.dim() != 4 or q.shape != k.shape or q.shape != v.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(
            f"dependency_attention: q, k, v must share one shape (batch, heads, seq, head_dim), not {shapes}"
        )
    if q.dtype != k.dtype or q.dtype != v.dtype or not q.dtype.is_floating_point:
        raise ValueError(
            f"dependency_attention: q, k, v must share one floating dtype, not {q.dtype}, {k.dtype}, {v.dtype}"
        )
    batch, _, seq, _ = q.shape
    if heads is not None and (not _fit(tuple(heads.shape), batch, seq) or heads.dtype not in INTEGER_TYPES):
        raise ValueError(
            f"dependency_attention: heads must be integer {(batch, seq)} or ({batch}, sets, {seq}), "
            f"not {heads.dtype} {tuple(heads.shape)}"
        )
    if seqlens is not None and (tuple(seqlens.shape) != (batch,) or seqlens.dtype not in INTEGER_TYPES):
        raise ValueError(
            f"dependency_attention: seqlens must be integer {(batch,)}, not {seqlens.dtype} {tuple(seqlens.shape)}"
        )
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dependency_attention: dropout_p must be in [0, 1), not {dropout_p}")


def _fit(heads: tuple[int, ...], batch: int, seq: int) -> bool:
    """Whether heads of this shape are one set of edges or several."""
    return heads == (batch, seq) or (len(heads) == 3 and (heads[0], heads[2]) == (batch, seq) and heads[1] > 0)
