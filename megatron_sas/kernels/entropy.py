"""Entropy of attention, and how much of it goes to given tokens, without forming a map.

With s_ij the scores and `LSE_i = log Σ_j exp(s_ij)`, the entropy of row i is

    H_i = -Σ_j α_ij log α_ij = LSE_i - Σ_j α_ij s_ij = LSE_i - scale · q_i · A_i,    A = attention(q, k, v = k),

so a flash kernel that is given the keys as values returns everything it takes. Its backward is all that the gradient
takes. With g_i = ∂L/∂H_i,

    ∂L/∂s_ij = -g_i α_ij (s_ij - Σ_j α_ij s_ij) = α_ij (dP_ij - δ_i),    dP_ij = dA_i · k_j,    δ_i = dA_i · A_i,

for dA_i = -g_i · scale · q_i: what a flash backward computes from dA for its scores. The three other ways in which H
depends on q and k cancel: LSE, the factor q_i, and the values k_j.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_sas.kernels.backends import BACKENDS, choose_backend, unsupported_reason
from megatron_sas.kernels.dependency_attention import window_bounds
from megatron_sas.kernels.reference import Window, accumulation_dtype, in_window


def attention_entropy(
    q: Tensor,
    k: Tensor,
    *,
    seqlens: Tensor | None = None,
    scale: float | None = None,
    window: int | tuple[int, int] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return the entropy of every row of attention before dropout, differentiable in q and k.

    The attention is computed in the inputs' dtype, and its product with q in float32: for bfloat16 a row of entropy is
    off by up to 2⁻⁹ of its scores. `attention_statistics` is exact, and has no gradient.

    Args:
        q, k: `(batch, heads, seq, head_dim)`, one floating dtype and device.
        seqlens: integer `(batch,)`, valid tokens per sequence, as in `dependency_attention`. None: all valid.
        scale: factor on the scores; 1/sqrt(head_dim) by default.
        window: of local attention, as in `dependency_attention`. None: attention to all tokens.
        backend: "auto", or one of `BACKENDS` that hands out its logsumexp.

    Returns:
        float32 (float64 for float64 inputs) `(batch, heads, seq)`, in nats. Rows beyond `seqlens` are finite but
        unspecified.

    Raises:
        ValueError: the backend hands out no logsumexp, or cannot take such inputs.
    """
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    with torch.autocast(q.device.type, enabled=False):  # it would round the scores to bfloat16
        return _entropy_and_lse(q, k, seqlens, scale, window_bounds(window, q.shape[2]), backend)[0]


@torch.no_grad()
def attention_statistics(
    q: Tensor,
    k: Tensor,
    *,
    seqlens: Tensor | None = None,
    groups: Sequence[Tensor] = (),
    scale: float | None = None,
    window: int | tuple[int, int] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, list[Tensor]]:
    """Return the entropy of every row of attention, and the attention that it gives to groups of tokens.

    Nothing has a gradient. All is computed in float32 (float64 for float64 inputs), because H is a small difference of
    numbers as large as the scores.

    Args:
        q, k: `(batch, heads, seq, head_dim)`, one floating dtype and device.
        seqlens: integer `(batch,)`, valid tokens per sequence, as in `dependency_attention`. None: all valid.
        groups: bool `(batch, seq)` each, the tokens of a group; few in every sequence.
        scale: factor on the scores; 1/sqrt(head_dim) by default.
        window: of local attention, as in `dependency_attention`. None: attention to all tokens.
        backend: "auto", or which kernel computes A: one of `BACKENDS` that hands out its logsumexp.

    Returns:
        The entropy in nats `(batch, heads, seq)`, and for every group Σ of α_ij over its tokens j, of the same shape.
        Rows beyond `seqlens` are finite but unspecified.

    Raises:
        ValueError: the backend hands out no logsumexp, or cannot take such inputs.
    """
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    dtype, bounds = accumulation_dtype(q.dtype), window_bounds(window, q.shape[2])
    with torch.autocast(q.device.type, enabled=False):
        q, k = q.to(dtype), k.to(dtype)
        entropy, lse = _entropy_and_lse(q, k, seqlens, scale, bounds, backend)
        if seqlens is not None:
            valid = torch.arange(q.shape[2], device=q.device) < seqlens[:, None]
            groups = [group & valid for group in groups]
        return entropy, [_attention_to(group, q, k, lse, scale, bounds) for group in groups]


def map_statistics(probs: Tensor, groups: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """What `attention_statistics` returns, from maps `(batch, heads, seq, seq)`; `groups` must leave out padding."""
    return -torch.xlogy(probs, probs).sum(-1), [(probs * group[:, None, None]).sum(-1) for group in groups]


def hands_out_entropy(backend: str, q: Tensor, window: Window = None) -> bool:
    """Whether `attention_entropy` can be computed by this backend for such queries."""
    if backend == "auto":
        return True
    return BACKENDS[backend].output_and_lse is not None and unsupported_reason(backend, q, 0.0, window=window) is None


def _entropy_and_lse(
    q: Tensor, k: Tensor, seqlens: Tensor | None, scale: float, window: Window, backend: str
) -> tuple[Tensor, Tensor]:
    """H and LSE, `(B, H, S)` each in nats; H has its gradient."""
    asked = {"has_seqlens": seqlens is not None, "window": window}
    if backend == "auto":
        backend = choose_backend(q, 0.0, **asked)
    if backend not in BACKENDS or BACKENDS[backend].output_and_lse is None:
        raise ValueError(f"entropy of attention: backend {backend!r} returns no logsumexp here; choose 'auto'")
    if (reason := unsupported_reason(backend, q, 0.0, **asked)) is not None:
        raise ValueError(f"entropy of attention: backend {backend!r}: {reason}; choose 'auto'")
    mean_key, lse = BACKENDS[backend].output_and_lse(q, k, k.detach(), seqlens, scale, window)
    dtype = accumulation_dtype(q.dtype)
    mean_score = (q.detach().to(dtype) * mean_key.to(dtype)).sum(-1) * scale
    return (lse - mean_score).clamp(min=0.0), lse


def _attention_to(group: Tensor, q: Tensor, k: Tensor, lse: Tensor, scale: float, window: Window) -> Tensor:
    """Σ_j α_ij over the tokens j of `group`, bool `(B, S)`: `(B, H, S)`."""
    most = int(group.sum(dim=1).max()) if len(group) else 0
    tokens = torch.argsort(group.to(torch.int8), dim=1, descending=True, stable=True)[:, :most]  # (B, N), members first
    seen = group.gather(1, tokens)[:, None, None, :]  # (B, 1, 1, N)
    if window is not None:
        rows = torch.arange(q.shape[2], device=q.device)
        seen = seen & in_window(rows[:, None], tokens[:, None, None, :], window)  # (B, 1, S, N)
    keys = k.gather(2, tokens[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3]))  # (B, H, N, D)
    probs = torch.exp(torch.matmul(q, keys.transpose(-1, -2)) * scale - lse[..., None])  # (B, H, S, N)
    return torch.where(seen, probs, 0.0).sum(-1)
