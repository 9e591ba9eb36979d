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
from megatron_sas.kernels.reference import accumulation_dtype, key_mask, valid_heads

ROWS = 64
"""Query rows held at a time: 64 rows of 512 float32 columns stay in a core's L2 cache for a handful of heads."""


def chunked_attention(
    q: Tensor, k: Tensor, v: Tensor, heads: Tensor | None, seqlens: Tensor | None, dropout_p: float, scale: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See `dependency_attention`."""
    heads = None if heads is None else valid_heads(heads, seqlens)
    mask = key_mask(seqlens, q.shape[2], accumulation_dtype(q.dtype))
    seed = dropout.draw_seed(q.device) if dropout_p > 0.0 else None
    return _ChunkedDependencyAttention.apply(q, k, v, heads, mask, dropout_p, scale, seed)


def chunked_output_and_lse(
    q: Tensor, k: Tensor, v: Tensor, seqlens: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention `(B, H, S, D)` without dropout, and the logsumexp `(B, H, S)` of its scores; neither has a gradient."""
    return _forward(q, k, v, key_mask(seqlens, q.shape[2], accumulation_dtype(q.dtype)), None, 0.0, scale)


def _row_blocks(seq: int) -> list[slice]:
    return [slice(start, min(start + ROWS, seq)) for start in range(0, seq, ROWS)]


def _dropout_factors(seed: Tensor | None, dropout_p: float, probs: Tensor, rows: slice, seq: int) -> Tensor | None:
    """The inverted-dropout mask of these rows, like `probs` `(B, H, rows, S)`; None without dropout."""
    if seed is None:
        return None
    kept = dropout.keep_mask(seed, dropout_p, *probs.shape[:2], rows, seq)
    return kept.to(probs.dtype).div_(1.0 - dropout_p)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seed: Tensor | None, dropout_p: float, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention `(B, H, S, D)`, and the logsumexp `(B, H, S)` of its scores."""
    dtype = accumulation_dtype(q.dtype)
    keys, values = k.to(dtype).transpose(-1, -2), v.to(dtype)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[:3], dtype=dtype, device=q.device)
    for rows in _row_blocks(q.shape[2]):
        scores = torch.matmul(q[:, :, rows].to(dtype), keys).mul_(scale)  # (B, H, rows, S)
        if mask is not None:
            scores += mask
        lse[:, :, rows] = torch.logsumexp(scores, dim=-1)
        probs = scores.sub_(lse[:, :, rows, None]).exp_()
        factors = _dropout_factors(seed, dropout_p, probs, rows, q.shape[2])
        out[:, :, rows] = torch.matmul(probs if factors is None else probs.mul_(factors), values).to(q.dtype)
    return out, lse


class _ChunkedDependencyAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, heads, mask, dropout_p, scale, seed):  # noqa: ANN001
        out, lse = _forward(q, k, v, mask, seed, dropout_p, scale)
        to_head, to_dependent = (None, None) if heads is None else edge_probs(q, k, lse, heads, scale)
        ctx.save_for_backward(q, k, v, heads, mask, seed, out, lse, to_head, to_dependent)
        ctx.dropout_p, ctx.scale = dropout_p, scale
        ctx.set_materialize_grads(False)
        return out, to_head, to_dependent

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_to_head, grad_to_dependent):  # noqa: ANN001
        q, k, v, heads, mask, seed, out, lse, to_head, to_dependent = ctx.saved_tensors
        scale, dtype = ctx.scale, lse.dtype
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        g_head = None if grad_to_head is None else to_head * grad_to_head
        g_dependent = None if grad_to_dependent is None else to_dependent * grad_to_dependent
        delta = (grad_out.to(dtype) * out.to(dtype)).sum(-1)
        row_sum = row_sums(g_head, g_dependent, heads)
        if row_sum is not None:
            delta += row_sum
        keys, values = k.to(dtype), v.to(dtype)
        grad_q = torch.empty(q.shape, dtype=dtype, device=q.device)
        grad_k, grad_v = (torch.zeros(q.shape, dtype=dtype, device=q.device) for _ in range(2))
        for rows in _row_blocks(q.shape[2]):
            queries, grad_rows = q[:, :, rows].to(dtype), grad_out[:, :, rows].to(dtype)
            scores = torch.matmul(queries, keys.transpose(-1, -2)).mul_(scale)
            if mask is not None:
                scores += mask
            probs = scores.sub_(lse[:, :, rows, None]).exp_()  # (B, H, rows, S)
            factors = _dropout_factors(seed, ctx.dropout_p, probs, rows, q.shape[2])
            dropped = probs if factors is None else probs * factors
            grad_v += torch.matmul(dropped.transpose(-1, -2), grad_rows)
            grad_probs = torch.matmul(grad_rows, values.transpose(-1, -2))
            if factors is not None:
                grad_probs.mul_(factors)
            grad_scores = grad_probs.sub_(delta[:, :, rows, None]).mul_(probs).mul_(scale)
            grad_q[:, :, rows] = torch.matmul(grad_scores, keys)
            grad_k += torch.matmul(grad_scores.transpose(-1, -2), queries)
        if row_sum is not None:
            add_entry_gradients_(grad_q, grad_k, q, k, heads, scale, g_head, g_dependent)
        return grad_q.to(q.dtype), grad_k.to(q.dtype), grad_v.to(q.dtype), None, None, None, None, None
