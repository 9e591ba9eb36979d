"""Entropy of attention, and how much of it goes to given tokens, without forming a map.

With s_ij the scores and `LSE_i = log Σ_j exp(s_ij)`, the entropy of row i is

    H_i = -Σ_j α_ij log α_ij = LSE_i - Σ_j α_ij s_ij = LSE_i - scale · q_i · A_i,    A = attention(q, k, v = k),

so a flash kernel that is given the keys as values returns everything it takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_sas.kernels.chunked import chunked_output_and_lse
from megatron_sas.kernels.dependency_attention import choose_backend, window_bounds
from megatron_sas.kernels.reference import Window, accumulation_dtype, in_window
from megatron_sas.kernels.sdpa import sdpa_output_and_lse


@torch.no_grad()
def attention_statistics(
    q: Tensor,
    k: Tensor,
    *,
    seqlens: Tensor | None = None,
    groups: Sequence[Tensor] = (),
    scale: float | None = None,
    backend: str = "auto",
    window: int | tuple[int, int] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Return the entropy of every row of attention, and the attention that it gives to groups of tokens.

    Nothing has a gradient. All is computed in float32 (float64 for float64 inputs), because H is a small difference of
    numbers as large as the scores.

    Args:
        q, k: `(batch, heads, seq, head_dim)`, one floating dtype and device.
        seqlens: integer `(batch,)`, valid tokens per sequence, as in `dependency_attention`. None: all valid.
        groups: bool `(batch, seq)` each, the tokens of a group; few in every sequence.
        scale: factor on the scores; 1/sqrt(head_dim) by default.
        backend: "auto", or which kernel computes A: "triton", "sdpa", "cudnn" or "chunked".
        window: attention is local, as in `dependency_attention`. None: all.

    Returns:
        The entropy in nats `(batch, heads, seq)`, and for every group Σ of α_ij over its tokens j, of the same shape.
        Rows beyond `seqlens` are finite but unspecified.
    """
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    dtype, bounds = accumulation_dtype(q.dtype), window_bounds(window, q.shape[2])
    with torch.autocast(q.device.type, enabled=False):  # it would round the scores to bfloat16
        q, k = q.to(dtype), k.to(dtype)
        if backend == "auto":
            backend = choose_backend(q, 0.0, has_seqlens=seqlens is not None, window=bounds)
        mean_key, lse = _output_and_lse(backend, q, k, seqlens, scale, bounds)
        entropy = (lse - (q * mean_key).sum(-1) * scale).clamp_(min=0.0)
        if seqlens is not None:
            valid = torch.arange(q.shape[2], device=q.device) < seqlens[:, None]
            groups = [group & valid for group in groups]
        return entropy, [_attention_to(group, q, k, lse, scale, bounds) for group in groups]


def _output_and_lse(
    backend: str, q: Tensor, k: Tensor, seqlens: Tensor | None, scale: float, window: Window
) -> tuple[Tensor, Tensor]:
    """A = attention(q, k, k) `(B, H, S, D)` and LSE `(B, H, S)` in nats."""
    if backend == "triton":
        from megatron_sas.kernels.triton.attention import triton_output_and_lse

        return triton_output_and_lse(q, k, k, seqlens, scale, window)
    if backend in ("sdpa", "cudnn"):
        return sdpa_output_and_lse(q, k, k, seqlens, scale, backend, window)
    if backend == "chunked":
        return chunked_output_and_lse(q, k, k, seqlens, scale, window)
    raise ValueError(f"attention_statistics: backend {backend!r} returns no logsumexp here; choose 'auto'")


def _attention_to(group: Tensor, q: Tensor, k: Tensor, lse: Tensor, scale: float, window: Window) -> Tensor:
    """Σ_j α_ij over the tokens j of `group`, bool `(B, S)`: `(B, H, S)`."""
    most = int(group.sum(dim=1).max())
    tokens = torch.argsort(group.to(torch.int8), dim=1, descending=True, stable=True)[:, :most]  # (B, N), members first
    member = group.gather(1, tokens)[:, None, None, :]  # (B, 1, 1, N)
    keys = k.gather(2, tokens[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3]))  # (B, H, N, D)
    probs = torch.exp(torch.matmul(q, keys.transpose(-1, -2)) * scale - lse[..., None])  # (B, H, S, N)
    if window is not None:
        rows = torch.arange(q.shape[2], device=q.device)[:, None]
        member = member & in_window(rows, tokens[:, None, None, :], window)  # (B, 1, S, N)
    return torch.where(member, probs, 0.0).sum(-1)
