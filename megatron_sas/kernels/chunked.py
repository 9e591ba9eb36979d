"""Dependency attention in plain tensor operations, a bounded number of query rows at a time.

Works on any device and dtype and with attention dropout; memory is O(rows · S) instead of O(S²). The backward
recomputes probabilities from the logsumexp and the dropout mask from its seed, as a flash kernel does.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_sas.kernels import dropout
from megatron_sas.kernels.edges import add_entry_gradients_, edge_probs, row_sums
from megatron_sas.kernels.reference import Window, accumulation_dtype, key_mask, mask_block, valid_heads

ROWS = 64
"""Query rows held at a time: 64 rows of 512 float32 columns stay in a core's L2 cache for a handful of heads."""


def run(
    q: Tensor, k: Tensor, v: Tensor, heads: Tensor | None, seqlens: Tensor | None, dropout_p: float, scale: float,
    window: Window,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """See `Backend.run`."""
    heads = None if heads is None else valid_heads(heads, seqlens)
    mask = key_mask(seqlens, q.shape[2], accumulation_dtype(q.dtype))
    seed = dropout.draw_seed(q.device) if dropout_p > 0.0 else None
    return _ChunkedDependencyAttention.apply(q, k, v, heads, mask, dropout_p, scale, window, seed)


def chunked_output_and_lse(
    q: Tensor, k: Tensor, v: Tensor, seqlens: Tensor | None, scale: float, window: Window = None
) -> tuple[Tensor, Tensor]:
    """Attention `(B, H, S, D)` without dropout, and the logsumexp `(B, H, S)` of its scores; neither has a gradient."""
    return _forward(q, k, v, key_mask(seqlens, q.shape[2], accumulation_dtype(q.dtype)), None, 0.0, scale, window)


def _blocks(seq: int, window: Window) -> list[tuple[slice, slice]]:
    """Blocks of rows, and the columns that any of their rows sees."""
    before, after = (seq, seq) if window is None else window
    return [
        (slice(start, min(start + ROWS, seq)), slice(max(0, start - before), min(start + ROWS + after, seq)))
        for start in range(0, seq, ROWS)
    ]


def _scores(
    queries: Tensor, keys: Tensor, mask: Tensor | None, rows: slice, columns: slice, scale: float, window: Window
) -> Tensor:
    """Scores `(B, H, rows, columns)` of queries `(B, H, rows, D)` and keys `(B, H, D, columns)`, -inf where unseen."""
    scores = torch.matmul(queries, keys).mul_(scale)
    block = mask_block(mask, rows, columns, window, scores)
    return scores if block is None else scores.add_(block)


def _dropout_factors(
    seed: Tensor | None, dropout_p: float, probs: Tensor, rows: slice, columns: slice, seq: int
) -> Tensor | None:
    """The inverted-dropout mask of these rows and columns, like `probs` `(B, H, rows, columns)`; or None."""
    if seed is None:
        return None
    kept = dropout.keep_mask(seed, dropout_p, *probs.shape[:2], rows, seq)[..., columns]
    return kept.to(probs.dtype).div_(1.0 - dropout_p)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seed: Tensor | None, dropout_p: float, scale: float,
    window: Window,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention `(B, H, S, D)`, and the logsumexp `(B, H, S)` of its scores."""
    dtype, seq = accumulation_dtype(q.dtype), q.shape[2]
    keys, values = k.to(dtype).transpose(-1, -2), v.to(dtype)  # (B, H, D, S), (B, H, S, D)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[:3], dtype=dtype, device=q.device)
    for rows, columns in _blocks(seq, window):
        queries = q[:, :, rows].to(dtype)  # (B, H, rows, D)
        scores = _scores(queries, keys[..., columns], mask, rows, columns, scale, window)
        lse[:, :, rows] = torch.logsumexp(scores, dim=-1)
        probs = scores.sub_(lse[:, :, rows, None]).exp_()  # (B, H, rows, columns)
        factors = _dropout_factors(seed, dropout_p, probs, rows, columns, seq)
        dropped = probs if factors is None else probs.mul_(factors)
        out[:, :, rows] = torch.matmul(dropped, values[:, :, columns]).to(q.dtype)
    return out, lse


class _ChunkedDependencyAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, heads, mask, dropout_p, scale, window, seed):  # noqa: ANN001
        out, lse = _forward(q, k, v, mask, seed, dropout_p, scale, window)
        to_head, to_dependent = (None, None) if heads is None else edge_probs(q, k, lse, heads, scale, window)
        ctx.save_for_backward(q, k, v, heads, mask, seed, out, lse, to_head, to_dependent)
        ctx.dropout_p, ctx.scale, ctx.window = dropout_p, scale, window
        ctx.set_materialize_grads(False)
        return out, to_head, to_dependent

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_to_head, grad_to_dependent):  # noqa: ANN001
        q, k, v, heads, mask, seed, out, lse, to_head, to_dependent = ctx.saved_tensors
        scale, dtype, seq = ctx.scale, lse.dtype, q.shape[2]
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        g_head = None if grad_to_head is None else to_head * grad_to_head
        g_dependent = None if grad_to_dependent is None else to_dependent * grad_to_dependent
        delta = (grad_out.to(dtype) * out.to(dtype)).sum(-1)  # (B, H, S)
        row_sum = row_sums(g_head, g_dependent, heads)
        if row_sum is not None:
            delta += row_sum
        keys, values = k.to(dtype), v.to(dtype)  # (B, H, S, D)
        grad_q = torch.empty(q.shape, dtype=dtype, device=q.device)
        grad_k, grad_v = (torch.zeros(q.shape, dtype=dtype, device=q.device) for _ in range(2))
        for rows, columns in _blocks(seq, ctx.window):
            queries, grad_rows = q[:, :, rows].to(dtype), grad_out[:, :, rows].to(dtype)  # (B, H, rows, D)
            seen = keys[:, :, columns]  # (B, H, columns, D)
            scores = _scores(queries, seen.transpose(-1, -2), mask, rows, columns, scale, ctx.window)
            probs = scores.sub_(lse[:, :, rows, None]).exp_()  # (B, H, rows, columns)
            factors = _dropout_factors(seed, ctx.dropout_p, probs, rows, columns, seq)
            dropped = probs if factors is None else probs * factors
            grad_v[:, :, columns].add_(torch.matmul(dropped.transpose(-1, -2), grad_rows))
            grad_probs = torch.matmul(grad_rows, values[:, :, columns].transpose(-1, -2))
            if factors is not None:
                grad_probs.mul_(factors)
            grad_scores = grad_probs.sub_(delta[:, :, rows, None]).mul_(probs).mul_(scale)
            grad_q[:, :, rows] = torch.matmul(grad_scores, seen)
            grad_k[:, :, columns].add_(torch.matmul(grad_scores.transpose(-1, -2), queries))
        if row_sum is not None:
            add_entry_gradients_(grad_q, grad_k, q, k, heads, scale, g_head, g_dependent)
        return grad_q.to(q.dtype), grad_k.to(q.dtype), grad_v.to(q.dtype), *(None,) * 6
