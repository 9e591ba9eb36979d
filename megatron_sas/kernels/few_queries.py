"""Attention of a few queries of each sequence to all of its keys, where only a few rows of the output are read.

B sequences, S tokens, R queries a sequence, H heads, D head dimension, M positions.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_sas.kernels import sdpa
from megatron_sas.kernels.dependency_attention import window_bounds
from megatron_sas.kernels.reference import Window, in_window, key_mask


class FewQueries(NamedTuple):
    """Which queries of each sequence are computed, and where among them those are that were asked for."""

    rows: Tensor  # int64 (B, R), positions, distinct within a sequence; others fill up what has fewer
    places: Tensor  # int64 (M,), flat indices into B·R


def few_queries(positions: Tensor, batch: int, seq: int) -> FewQueries:
    """The queries at `positions`, int64 `(M,)`, flat indices into B·S in any order, some maybe several times.

    R is the largest number in a sequence, at least 1.
    """
    wanted = torch.zeros(batch * seq, dtype=torch.bool, device=positions.device)
    wanted[positions] = True
    wanted = wanted.view(batch, seq)
    most = max(int(wanted.sum(dim=1).max()), 1)
    first = torch.arange(0, batch * most, most, device=positions.device)[:, None]
    places = first + wanted.cumsum(dim=1) - 1  # (B, S)
    return FewQueries(sdpa.first_true(wanted, most), places.flatten()[positions])


def takes_few_queries(backend: str, x: Tensor) -> bool:
    """Whether `attention_of` computes what `backend` does without dropout, from hidden states like `x`, `(B, S, C)`.

    Only torch's flash kernel for the CPU is called with fewer queries than keys. A GPU would be waited for to learn R,
    compiled code wants a fixed R, and in both attention is a small part of a layer.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling() or backend not in ("auto", "sdpa"):
        return False
    return sdpa.unsupported_reason(x, 0.0, False, 1, None, backend="sdpa") is None


def attention_of(
    rows: Tensor, q: Tensor, k: Tensor, v: Tensor, *, seqlens: Tensor | None = None, window: Window = None
) -> Tensor:
    """`out` of `dependency_attention` without edges and dropout, `(B, H, R, D)`, at some of its rows.

    Args:
        rows: int64 `(B, R)`, the queries' positions.
        q: `(B, H, R, D)`.
        k, v: `(B, H, S, D)`.
        seqlens, window: as in `dependency_attention`.
    """
    seq, bounds = k.shape[2], window_bounds(window, k.shape[2])
    mask = key_mask(seqlens, seq, q.dtype)
    if bounds is not None:
        row, column = rows[:, None, :, None], torch.arange(seq)  # (B, 1, R, 1), (S,)
        seen = in_window(row, column, bounds)
        if mask is not None:
            limit = seqlens.to(torch.int64).clamp(min=1).view(-1, 1, 1, 1)
            seen &= (column < limit) | (row >= limit)  # rows of padding see something, so that they are finite
        mask = torch.zeros(seen.shape, dtype=q.dtype).masked_fill_(~seen, float("-inf"))
    elif mask is not None:
        mask = mask.expand(-1, 1, q.shape[2], -1)
    scale = 1.0 / math.sqrt(q.shape[-1])
    with torch.autocast(q.device.type, enabled=False):
        return sdpa.flash_attention(q, k, v, mask, scale)
