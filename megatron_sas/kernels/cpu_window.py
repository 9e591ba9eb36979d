"""Local attention on torch's flash kernel for the CPU, which has masks but no windows.

Queries are cut into blocks, and every block is a sequence of its own with the keys that any of its queries sees. So the
work grows with S · window instead of S². Sequences that are hardly longer than such a block are computed as a whole.
B sequences, H heads, S tokens, D head dimension, n blocks of R queries and C keys each.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_sas.kernels.reference import in_window

ROWS = 64
"""Queries of a block, where the window is no wider; measured fastest with a window of 128."""
WORTH_CUTTING = 0.75
"""Share of the whole square up to which blocks cost less than that: they are copied, and overlap."""

_aten = torch.ops.aten


@dataclass(frozen=True)
class CpuFlashInWindow:
    """A kernel as those in `sdpa.py`, for one window (keys before, keys after) and length S."""

    window: tuple[int, int]
    seq: int

    @property
    def rows(self) -> int:
        """R; S where the sequence is not cut."""
        before, after = self.window
        rows = max(ROWS, before, after)
        return rows if rows + before + after <= WORTH_CUTTING * self.seq else self.seq

    @property
    def margins(self) -> tuple[int, int]:
        """Keys of a block before its first and after its last query."""
        return (0, 0) if self.rows == self.seq else self.window

    def mask(self, seqlens: Tensor | None, q: Tensor) -> Tensor:
        """The additive mask of all blocks, `(B·n, 1, R, C)`: 0 for the keys that a query sees, -inf for others.

        Queries beyond the valid length see all keys in their window, those beyond S everything.
        """
        if seqlens is None and not torch.compiler.is_compiling():
            return _unpadded_mask(self, len(q), q.dtype)
        return self._mask(seqlens, len(q), q.dtype)

    def _mask(self, seqlens: Tensor | None, batch: int, dtype: torch.dtype) -> Tensor:
        rows, (before, after) = self.rows, self.margins
        first = torch.arange(0, self.seq, rows)[:, None, None]  # (n, 1, 1)
        row, column = first + torch.arange(rows)[:, None], first - before + torch.arange(rows + before + after)
        seen = in_window(row, column, self.window) & (column >= 0) & (column < self.seq)  # (n, R, C)
        if seqlens is not None:
            limit = seqlens.to(torch.int64).clamp(min=1).view(-1, 1, 1, 1)
            seen = seen & ((column < limit) | (row >= limit))  # (B, n, R, C)
        seen = (seen | (row >= self.seq)).expand(batch, -1, -1, -1).flatten(0, 1)[:, None]
        return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout_p: float, scale: float
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """`out` `(B, H, S, D)`, `lse` `(B, H, S)` float32 (float64 for float64), and both in blocks."""
        queries, (keys, values) = self._cut(q, (0, 0)), (self._cut(x, self.margins) for x in (k, v))
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
            queries, keys, values, 0.0, False, attn_mask=mask, scale=scale
        )
        return self._joined(out, (0, 0)), self._joined(lse[..., None], (0, 0))[..., 0], (lse,)

    def backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, out: Tensor, lse: Tensor,
        rest: tuple[Tensor], dropout_p: float, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of q, k and v."""
        grad_out, queries, out = (self._cut(x, (0, 0)) for x in (grad_out, q, out))
        keys, values = (self._cut(x, self.margins) for x in (k, v))
        gradients = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, queries, keys, values, out, rest[0], 0.0, False, attn_mask=mask, scale=scale
        )
        margins = ((0, 0), self.margins, self.margins)
        return tuple(self._joined(x, around) for x, around in zip(gradients, margins, strict=True))

    def _cut(self, x: Tensor, margins: tuple[int, int]) -> Tensor:
        """Blocks `(B·n, H, R + margins, D)` of `(B, H, S, D)`, with zeros beyond its ends."""
        if self.rows == self.seq:
            return x
        before, after = margins
        padded = F.pad(x, (0, 0, before, -self.seq % self.rows + after))
        blocks = padded.unfold(2, self.rows + before + after, self.rows)  # (B, H, n, D, R + margins)
        return blocks.permute(0, 2, 1, 4, 3).flatten(0, 1).contiguous()

    def _joined(self, blocks: Tensor, margins: tuple[int, int]) -> Tensor:
        """`(B, H, S, D)` from blocks `(B·n, H, R + margins, D)`; where blocks overlap, they are added up."""
        if self.rows == self.seq:
            return blocks
        before, after = margins
        number = -(-self.seq // self.rows)
        parts = blocks.unflatten(0, (-1, number))  # (B, n, H, R + margins, D)
        if margins == (0, 0):
            return parts.transpose(1, 2).flatten(2, 3)[:, :, : self.seq]
        batch, _, heads, length, dim = parts.shape
        total = parts.new_zeros((batch, heads, number * self.rows + before + after, dim))
        for i, part in enumerate(parts.unbind(1)):
            total[:, :, i * self.rows : i * self.rows + length] += part
        return total[:, :, before : before + self.seq]


@functools.lru_cache(maxsize=2)  # it holds a copy for every sequence of a batch
def _unpadded_mask(kernel: CpuFlashInWindow, batch: int, dtype: torch.dtype) -> Tensor:
    """The mask without padding, which all local layers and all steps share."""
    with torch.inference_mode(mode=False):  # a tensor made in that mode could not be kept for a backward
        return kernel._mask(None, batch, dtype)
