"""The obvious implementation: form the map, read the entries. For tests and explanations; memory grows with S²."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_sas.kernels import dropout

Window = tuple[int, int] | None
"""How many keys before and after its own position a query sees; None: all."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 inputs, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def key_mask(seqlens: Tensor | None, seq: int, dtype: torch.dtype) -> Tensor | None:
    """Additive mask `(batch, 1, 1, seq)`: 0 for valid keys, -inf for later ones; an empty sequence keeps its first key,

    so that no row of the softmax is empty and unspecified rows stay finite."""
    if seqlens is None:
        return None
    positions = torch.arange(seq, device=seqlens.device)
    invalid = positions >= seqlens.to(torch.int64).clamp(min=1)[:, None]
    mask = torch.zeros(invalid.shape, dtype=dtype, device=seqlens.device).masked_fill_(invalid, float("-inf"))
    return mask[:, None, None, :]


def in_window(rows: Tensor, columns: Tensor, window: tuple[int, int]) -> Tensor:
    """Whether the query at position `rows` sees the key at position `columns`; both broadcast."""
    before, after = window
    return (columns >= rows - before) & (columns <= rows + after)


def mask_block(mask: Tensor | None, rows: slice, columns: slice, window: Window, like: Tensor) -> Tensor | None:
    """Return the additive mask of some rows and columns of a map, which broadcasts to `(batch, heads, rows, columns)`.

    Rows of padding see all keys in their window, so that none is empty.

    Args:
        mask: as `key_mask` returns.
        rows, columns: slices with start and stop.
        window: None, or how many keys before and after its position a query sees.
        like: a tensor with the dtype and device of the scores.
    """
    if window is None:
        return None if mask is None else mask[..., columns]
    positions = [torch.arange(part.start, part.stop, device=like.device) for part in (rows, columns)]
    outside = ~in_window(positions[0][:, None], positions[1], window)  # (rows, columns)
    if mask is None:
        keys = like.new_zeros(outside.shape)
    else:
        keys = torch.where(mask[..., rows].mT == 0, mask[..., columns], 0.0)  # (B, 1, rows, columns)
    return keys.masked_fill(outside, float("-inf"))


def valid_heads(heads: Tensor, seqlens: Tensor | None) -> Tensor:
    """int64 heads `(B, S)` or `(B, sets, S)` in which every edge that leaves the valid part of its sequence is -1."""
    heads = heads.to(torch.int64)
    positions = torch.arange(heads.shape[-1], device=heads.device)
    limit = heads.shape[-1] if seqlens is None else seqlens.to(torch.int64).view(-1, *[1] * (heads.dim() - 1))
    valid = (heads >= 0) & (heads < limit) & (positions < limit)
    return torch.where(valid, heads, -1)


def attention_probs(q: Tensor, k: Tensor, seqlens: Tensor | None, scale: float, window: Window = None) -> Tensor:
    """The whole map α `(batch, heads, seq, seq)`, before dropout, in float32 (float64 for float64 inputs)."""
    dtype, every = accumulation_dtype(q.dtype), slice(0, q.shape[2])
    with torch.autocast(q.device.type, enabled=False):  # it would round the scores to bfloat16
        scores = torch.matmul(q.to(dtype), k.to(dtype).transpose(-1, -2)) * scale  # (B, H, S, S)
    mask = mask_block(key_mask(seqlens, q.shape[2], dtype), every, every, window, scores)
    return torch.softmax(scores if mask is None else scores + mask, dim=-1)


def run(
    q: Tensor, k: Tensor, v: Tensor, heads: Tensor | None, seqlens: Tensor | None, dropout_p: float, scale: float,
    window: Window,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """See `Backend.run`."""
    probs = attention_probs(q, k, seqlens, scale, window)  # (B, H, S, S)
    dropped = probs
    if dropout_p > 0.0:
        kept = dropout.keep_mask(dropout.draw_seed(q.device), dropout_p, *q.shape[:2], slice(0, q.shape[2]), q.shape[2])
        dropped = torch.where(kept, probs / (1.0 - dropout_p), 0.0)
    out = torch.matmul(dropped, v.to(probs.dtype)).to(q.dtype)  # (B, H, S, D)
    if heads is None:
        return out, None, None
    return out, *entries(probs, valid_heads(heads, seqlens))


def entries(probs: Tensor, heads: Tensor) -> tuple[Tensor, Tensor]:
    """`to_head` and `to_dependent` of maps `(B, H, S, S)`, for valid heads `(B, S)` or `(B, sets, S)`."""
    if heads.dim() == 3:
        along = [entries(probs, one) for one in heads.unbind(1)]
        return torch.stack([first for first, _ in along], 1), torch.stack([second for _, second in along], 1)
    index = heads.clamp(min=0)[:, None, :, None].expand(-1, probs.shape[1], -1, -1)  # (B, H, S, 1)
    edge = (heads >= 0)[:, None, :]
    to_head = torch.where(edge, probs.gather(-1, index).squeeze(-1), 0.0)
    to_dependent = torch.where(edge, probs.transpose(-1, -2).gather(-1, index).squeeze(-1), 0.0)
    return to_head, to_dependent
