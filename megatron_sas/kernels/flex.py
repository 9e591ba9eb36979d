"""Dependency attention on torch's FlexAttention, which returns the logsumexp and takes a gradient for it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_sas.kernels.lse_attention import entries_by_autograd
from megatron_sas.kernels.reference import Window, in_window


def unsupported_reason(q: Tensor, dropout_p: float, has_seqlens: bool, sets: int, window: Window) -> str | None:
    """Return why FlexAttention cannot take such inputs, or None when it can."""
    if dropout_p > 0.0:
        return "the kernel has no attention dropout"
    if q.numel() == 0:
        return "the kernel cannot take empty tensors"
    if q.device.type == "cpu" and torch.is_grad_enabled() and q.requires_grad:
        return "FlexAttention has no backward on CPU"
    if q.device.type == "cuda" and not torch.is_grad_enabled():
        return "FlexAttention is compiled for every shape, of which evaluations have many"
    return None


def run(
    q: Tensor, k: Tensor, v: Tensor, heads: Tensor | None, seqlens: Tensor | None, dropout_p: float, scale: float,
    window: Window, *, attend: Callable[..., tuple[Tensor, Any]] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """See `Backend.run`; `attend` instead of torch's `flex_attention`, compiled on a GPU and its fallback on a CPU."""
    from torch.nn.attention.flex_attention import AuxRequest

    attend = attend or _flex_attention(q.device.type == "cuda")
    mask = _block_mask(q, seqlens, window)
    out, more = attend(q, k, v, block_mask=mask, scale=scale, return_aux=AuxRequest(lse=True))
    if heads is None:
        return out, None, None
    return out, *entries_by_autograd(
        q, k, more.lse, heads, seqlens, scale, window, backend="flex",
        remedy="install a torch whose FlexAttention takes a kernel that has one",
    )  # fmt: skip


def _block_mask(q: Tensor, seqlens: Tensor | None, window: Window) -> Any:
    """The keys that each query sees, as FlexAttention takes them (see `reference.mask_block`); None: all."""
    if seqlens is None and window is None:
        return None
    from torch.nn.attention.flex_attention import create_block_mask

    batch, _, seq, _ = q.shape
    limit = torch.full((batch,), seq, device=q.device) if seqlens is None else seqlens.to(torch.int64).clamp(min=1)

    def sees(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        if window is None:
            return column < limit[b]
        return in_window(row, column, window) & ((column < limit[b]) | (row >= limit[b]))

    return create_block_mask(sees, batch, None, seq, seq, device=q.device)


@functools.cache
def _flex_attention(compiled: bool) -> Callable[..., tuple[Tensor, Any]]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False) if compiled else flex_attention
