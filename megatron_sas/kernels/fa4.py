"""Dependency attention on FlashAttention-4, which returns the logsumexp and takes a gradient for it (since 4.0.0b5)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from megatron_sas.kernels.lse_attention import entries_by_autograd
from megatron_sas.kernels.reference import Window


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


def unsupported_reason(q: Tensor, dropout_p: float, has_seqlens: bool, sets: int, window: Window) -> str | None:
    """Return why FlashAttention-4 cannot take such inputs, or None when it can."""
    if dropout_p > 0.0:
        return "the kernel has no attention dropout"
    if q.numel() == 0:
        return "the kernel cannot take empty tensors"
    if not has_fa4():
        return "FlashAttention-4 cannot be imported (PyPI: flash-attn-4)"
    if q.device.type != "cuda" or q.dtype not in (torch.float16, torch.bfloat16):
        return "FlashAttention-4 takes float16 and bfloat16 on a GPU"
    if has_seqlens or window is not None:
        return f"FlashAttention-4 is used without {'seqlens' if has_seqlens else 'a window'}"
    return None


def run(
    q: Tensor, k: Tensor, v: Tensor, heads: Tensor | None, seqlens: Tensor | None, dropout_p: float, scale: float,
    window: Window,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """See `Backend.run`."""
    from flash_attn.cute import flash_attn_func

    out, lse = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), softmax_scale=scale, return_lse=True)
    out = out.transpose(1, 2)  # (B, H, S, D)
    if heads is None:
        return out, None, None
    return out, *entries_by_autograd(
        q, k, lse, heads, seqlens, scale, window, backend="fa4", remedy="install flash-attn-4 4.0.0b5 or later"
    )
