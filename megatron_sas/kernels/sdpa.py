"""Dependency attention on torch's own flash kernel, unmodified.

A flash backward computes δ_i = Σ_d dO_id · O_id from the tensors it is given and uses O for nothing else. Handing it

    O' = O + (t_i / ‖dO_i‖²) · dO_i        so that dO_i · O'_i = δ_i + t_i

therefore yields the dense part of the exact gradient (see `edges.py`); the entries themselves are added afterwards.
Rows of dO that are (almost) zero are the normal case, not a rare one: the LM head reads only masked positions, so
about 85 % of the last layer's rows are exactly zero. Such a row is first replaced by `FILLER` in one component, which
changes no gradient visibly (it enters dV and dP linearly, at 1e-15) but gives O' something to be multiplied with.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_sas.kernels.edges import add_entry_gradients_, edge_probs, row_sums
from megatron_sas.kernels.reference import accumulation_dtype, key_mask

FILLER = {torch.float32: 2.0**-50, torch.bfloat16: 2.0**-50, torch.float64: 2.0**-200}
"""By dtype: far below any gradient's rounding, while 1 / FILLER, to which O' may grow, is far from overflow."""

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def sdpa_refusal(q: Tensor, dropout_p: float) -> str | None:
    """Why this backend cannot take such inputs, or None when it can."""
    if q.device.type != "cpu":
        return f"torch's CPU flash kernel cannot take tensors on {q.device.type}"
    if dropout_p > 0.0:
        return "torch's CPU flash kernel has no attention dropout"
    if q.dtype == torch.float16:
        return "float16 cannot hold the substituted output (it spans 2^±50); use bfloat16 or float32"
    if q.shape[2] == 0 or q.shape[3] == 0 or q.shape[0] * q.shape[1] == 0:
        return "torch's CPU flash kernel cannot take empty tensors"
    return None


def sdpa_attention(
    q: Tensor, k: Tensor, v: Tensor, heads: Tensor | None, seqlens: Tensor | None, dropout_p: float, scale: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See `dependency_attention`; `heads` is int64 with -1 wherever there is no edge."""
    reason = sdpa_refusal(q, dropout_p)
    if reason is not None:
        raise ValueError(f"dependency_attention: backend 'sdpa': {reason}; choose 'chunked'")
    mask = key_mask(seqlens, q.shape[2], q.dtype)
    if mask is not None:  # strides of 0: the kernel's mask argument is (B, 1, S, S), its memory (B, S)
        mask = mask.expand(-1, 1, q.shape[2], -1)
    return _SdpaDependencyAttention.apply(q, k, v, heads, mask, scale)


class _SdpaDependencyAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, heads, mask, scale):  # noqa: ANN001
        out, lse = _forward(q, k, v, 0.0, False, attn_mask=mask, scale=scale)
        to_head, to_dependent = (None, None) if heads is None else edge_probs(q, k, lse, heads, scale)
        ctx.save_for_backward(q, k, v, heads, mask, out, lse, to_head, to_dependent)
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        return out, to_head, to_dependent

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_to_head, grad_to_dependent):  # noqa: ANN001
        q, k, v, heads, mask, out, lse, to_head, to_dependent = ctx.saved_tensors
        scale = ctx.scale
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        g_head = None if grad_to_head is None else to_head * grad_to_head
        g_dependent = None if grad_to_dependent is None else to_dependent * grad_to_dependent
        row_sum = row_sums(g_head, g_dependent, heads)
        if row_sum is not None:
            grad_out, out = substitute(grad_out, out, row_sum)
        grad_q, grad_k, grad_v = _backward(grad_out, q, k, v, out, lse, 0.0, False, attn_mask=mask, scale=scale)
        if row_sum is not None:
            # The entries are added in float32 before rounding to q's dtype.
            dtype = accumulation_dtype(q.dtype)
            grad_q, grad_k = grad_q.to(dtype), grad_k.to(dtype)
            if g_head is not None:
                add_entry_gradients_(grad_q, grad_k, q, k, heads, scale, g_head, transposed=False)
            if g_dependent is not None:
                add_entry_gradients_(grad_q, grad_k, q, k, heads, scale, g_dependent, transposed=True)
            grad_q, grad_k = grad_q.to(q.dtype), grad_k.to(q.dtype)
        return grad_q, grad_k, grad_v, None, None, None


def substitute(grad_out: Tensor, out: Tensor, row_sum: Tensor) -> tuple[Tensor, Tensor]:
    """dO and O' such that Σ_d dO_id · O'_id = δ_i + t_i; all `(B, H, S, D)`, `row_sum` t `(B, H, S)`.

    Rows with t_i = 0 are returned unchanged, so plain attention keeps its own bits.
    """
    dtype = accumulation_dtype(out.dtype)
    size = FILLER[grad_out.dtype]
    square = torch.linalg.vector_norm(grad_out, dim=-1, dtype=dtype).square_()  # (B, H, S); 0 if it underflows
    fill = (square < size**2) & (row_sum != 0)
    filler = torch.zeros(grad_out.shape[-1], dtype=grad_out.dtype, device=grad_out.device)
    filler[0] = size
    grad_out = torch.where(fill[..., None], filler, grad_out)
    square = torch.where(fill, size**2, square)
    factor = torch.where(row_sum != 0, row_sum / square, 0.0)
    return grad_out, torch.addcmul(out.to(dtype), factor[..., None], grad_out.to(dtype)).to(out.dtype)
