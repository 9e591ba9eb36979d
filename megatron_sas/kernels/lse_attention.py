"""Dependency attention on kernels that return the logsumexp and take a gradient for it: FlexAttention and FA4.

The probabilities of entries are then ordinary differentiable expressions of q, k and the logsumexp. Neither kernel has
attention dropout.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_sas.kernels.edges import edge_probs
from megatron_sas.kernels.reference import valid_heads

REMEDIES = {
    "flex": "install a torch whose FlexAttention takes a kernel that has one",
    "fa4": "install flash-attn-4 4.0.0b5 or later",
}
"""What to do about a logsumexp without gradient, by backend."""


@functools.cache
def has_fa4() -> bool:
    """Whether FlashAttention-4 can be imported; asked only where it is wanted, as FlashAttention-2 is imported with it.

    A FlashAttention-2 that was built for another torch raises all kinds of errors.
    """
    try:
        from flash_attn.cute import flash_attn_func  # noqa: F401
    except Exception:
        return False
    return True


def lse_refusal(backend: str, q: Tensor, has_seqlens: bool, dropout_p: float) -> str | None:
    """Why the backend ("flex" or "fa4") cannot take such inputs, or None when it can."""
    if dropout_p > 0.0:
        return "the kernel has no attention dropout"
    if q.numel() == 0:
        return "the kernel cannot take empty tensors"
    if backend == "flex" and q.device.type == "cpu" and torch.is_grad_enabled() and q.requires_grad:
        return "FlexAttention has no backward on CPU"
    if backend == "flex" and q.device.type == "cuda" and not torch.is_grad_enabled():
        return "FlexAttention is compiled for every shape, of which evaluations have many"
    if backend == "fa4":
        if not has_fa4():
            return "FlashAttention-4 cannot be imported (PyPI: flash-attn-4)"
        if q.device.type != "cuda" or q.dtype not in (torch.float16, torch.bfloat16):
            return "FlashAttention-4 takes float16 and bfloat16 on a GPU"
        if has_seqlens:
            return "FlashAttention-4 is used without seqlens"
    return None


def lse_attention(
    q: Tensor, k: Tensor, v: Tensor, heads: Tensor | None, seqlens: Tensor | None, dropout_p: float, scale: float,
    backend: str,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """See `dependency_attention`; `backend` is "flex" or "fa4"."""
    out, lse = (_flex if backend == "flex" else _fa4)(q, k, v, seqlens, scale)
    if heads is None:
        return out, None, None
    _refuse_lse_without_gradient(backend, q, k, lse)
    return out, *edge_probs(q, k, lse, valid_heads(heads, seqlens), scale)


def _refuse_lse_without_gradient(backend: str, q: Tensor, k: Tensor, lse: Tensor) -> None:
    """Raise `ValueError` where autograd would take the logsumexp for a constant and leave the softmax term of R out.

    Not while compiling, when tensors do not always tell; the trainer has called the backend uncompiled before that.
    """
    wanted = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    if wanted and not lse.requires_grad and not torch.compiler.is_compiling():
        raise ValueError(
            f"dependency_attention: backend {backend!r}: its logsumexp has no gradient, so that of the regularizer "
            f"would be wrong; {REMEDIES[backend]}, or choose 'auto'"
        )


def _flex(q: Tensor, k: Tensor, v: Tensor, seqlens: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """torch's FlexAttention, compiled on a GPU and as torch's plain fallback on a CPU."""
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask

    mask = None
    if seqlens is not None:
        limit = seqlens.to(torch.int64).clamp(min=1)
        mask = create_block_mask(
            lambda b, h, row, column: column < limit[b], q.shape[0], None, q.shape[2], q.shape[2], device=q.device
        )
    flex = _flex_function(q.device.type == "cuda")
    out, more = flex(q, k, v, block_mask=mask, scale=scale, return_aux=AuxRequest(lse=True))
    return out, more.lse


@functools.cache
def _flex_function(compiled: bool) -> Callable[..., tuple[Tensor, Any]]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False) if compiled else flex_attention


def _fa4(q: Tensor, k: Tensor, v: Tensor, seqlens: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    from flash_attn.cute import flash_attn_func

    out, lse = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), softmax_scale=scale, return_lse=True)
    return out.transpose(1, 2), lse
