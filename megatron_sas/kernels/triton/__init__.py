"""Dependency attention in Triton: forward, backward, and the entries along edges.

Triton itself is imported at the first use: CUDA builds of torch bring it, others do without.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megatron_sas.kernels.edges import HAS_TRITON
from megatron_sas.kernels.reference import Window


def unsupported_reason(q: Tensor, dropout_p: float, has_seqlens: bool, sets: int, window: Window) -> str | None:
    """Return why these kernels cannot take such inputs, or None when they can."""
    if not HAS_TRITON:
        return "Triton is not installed (CUDA builds of torch bring it)"
    from megatron_sas.kernels.triton import attention

    return attention.unsupported_reason(q)


def run(*arguments: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See `Backend.run`."""
    from megatron_sas.kernels.triton import attention

    return attention.run(*arguments)


def output_and_lse(*arguments: Any) -> tuple[Tensor, Tensor]:
    """See `Backend.output_and_lse`."""
    from megatron_sas.kernels.triton import attention

    return attention.output_and_lse(*arguments)
