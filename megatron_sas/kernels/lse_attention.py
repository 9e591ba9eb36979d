"""Dependency attention on kernels that return the logsumexp and take a gradient for it: FlexAttention and FA4.

The probabilities of entries are then ordinary differentiable expressions of q, k and the logsumexp.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_sas.kernels.edges import edge_probs
from megatron_sas.kernels.reference import Window, valid_heads


def entries_by_autograd(
    q: Tensor, k: Tensor, lse: Tensor, heads: Tensor, seqlens: Tensor | None, scale: float, window: Window, *,
    backend: str, remedy: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return `to_head` and `to_dependent` of `dependency_attention`, from the logsumexp `(B, H, S)` of its scores.

    Raises:
        ValueError: autograd would take the logsumexp for a constant and leave the softmax term of R out; the message
            names `backend` and says what to do, `remedy`. Not while compiling, when tensors do not always tell; the
            trainer has called the backend uncompiled before that.
    """
    wanted = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    if wanted and not lse.requires_grad and not torch.compiler.is_compiling():
        raise ValueError(
            f"dependency_attention: backend {backend!r}: its logsumexp has no gradient, so that of the regularizer "
            f"would be wrong; {remedy}, or choose 'auto'"
        )
    return edge_probs(q, k, lse, valid_heads(heads, seqlens), scale, window)
