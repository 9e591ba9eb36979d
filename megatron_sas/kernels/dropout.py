"""Dropout of hidden states on CPUs; and the dropout mask of attention probabilities.

The latter is a function of (seed, sequence, head, row, column), the same everywhere. Every backend of ours computes the
same mask from the same seed, so forward and backward agree without storing it, and backends can be compared with
dropout on. Each row and each column of a map gets a well-mixed odd 32-bit key. The hash of an entry is the product of
its two keys modulo 2^32, and the entry is kept when that is at least p · 2^32: one multiplication and one comparison,
where a Philox block would cost more than the attention itself. Masks show no correlation between entries, rows, columns
or maps (tested).

All arithmetic is on unsigned 32-bit integers; torch has none, so int32 stands for them here, with the same bits.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

GOLDEN = 0x9E3779B9  # 2^32 / golden ratio: neighbouring counters get keys far apart
MIX_1, MIX_2 = 0x7FEB352D, 0x846CA68B  # multipliers of C. Wellons' `lowbias32`
ROWS, COLUMNS = 0, 1
FEW = 2**15


class Dropout(nn.Dropout):
    """`nn.Dropout`, two to five times as fast on a CPU, where torch draws and keeps a float for every number.

    Masks still follow torch's default generator, by one seed a call. `nn.Dropout` is faster on few numbers.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Of any shape."""
        if not self.training or self.p == 0.0:
            return input
        if input.device.type != "cpu" or input.numel() < FEW or torch.compiler.is_compiling():
            return super().forward(input)
        return _CpuDropout.apply(input, self.p)


class _CpuDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p):  # noqa: ANN001
        kept, ctx.scale = draw_kept(x.numel(), p, int(draw_seed(x.device))).view(x.shape), 1.0 / (1.0 - p)
        ctx.save_for_backward(kept)
        return _masked(x, kept, ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # noqa: ANN001
        return _masked(grad, *ctx.saved_tensors, ctx.scale), None


def _masked(x: Tensor, kept: Tensor, scale: float) -> Tensor:
    return kept.to(x.dtype).mul_(x).mul_(scale)  # `kept * x` takes 30 times as long as a product of floats


def draw_kept(count: int, dropout_p: float, seed: int) -> Tensor:
    """Boolean `(count,)`: which numbers dropout keeps, each with probability 1 - p, independently.

    A random byte decides about nearly all: those below the byte of p · 256 go, those above stay. Of those that meet it
    64 bits more decide, so that p is exact to 2^-72.
    """
    bits = np.random.SFC64(seed)
    draws = bits.random_raw(-(-count // 8)).view(np.uint8)[:count]
    byte, rest = divmod(dropout_p * 256, 1.0)
    byte = np.uint8(byte)  # with a float NumPy would convert all draws
    kept = draws > byte
    ties = np.flatnonzero(draws == byte)
    kept[ties] = bits.random_raw(len(ties)) >= np.uint64(rest * 2.0**64)
    return torch.from_numpy(kept)


def draw_seed(device: torch.device) -> Tensor:
    """int64 `(1,)` from torch's default generator of the device; nothing waits for the device."""
    return torch.randint(2**62, (1,), device=device)


def drop_threshold(dropout_p: float) -> int:
    """An entry is kept when its 32-bit hash is at least this: round(p · 2^32)."""
    return min(round(dropout_p * 2**32), 2**32 - 1)


def keep_mask(seed: Tensor, dropout_p: float, batch: int, num_heads: int, rows: slice, seq: int) -> Tensor:
    """Boolean `(batch, num_heads, rows, seq)`: which entries of these query rows are kept.

    Args:
        seed: as `draw_seed` returns.
        rows: a slice with start and stop.
    """
    maps = torch.arange(batch * num_heads, device=seed.device, dtype=torch.int32).view(batch, num_heads, 1)
    row_keys, column_keys = _keys(seed, maps, ROWS, rows.start, rows.stop), _keys(seed, maps, COLUMNS, 0, seq)
    hashes = row_keys[..., None] * column_keys[..., None, :]
    # Unsigned order is signed order after flipping the highest bit.
    return hashes.bitwise_xor_(-(2**31)) >= drop_threshold(dropout_p) - 2**31


def _keys(seed: Tensor, maps: Tensor, which: int, start: int, stop: int) -> Tensor:
    """int32 `(batch, num_heads, stop - start)`: the keys of rows or of columns."""
    low, high = (seed & 0xFFFFFFFF), (seed >> 32)
    low, high = (torch.where(x >= 2**31, x - 2**32, x).to(torch.int32) for x in (low, high))
    base = _mix(_mix(_mix(maps * 2 + which) ^ high) ^ low)
    counters = torch.arange(start, stop, device=seed.device, dtype=torch.int32) * _signed(GOLDEN)
    return _mix(base + counters) | 1


def _mix(x: Tensor) -> Tensor:
    """`lowbias32`: a bijection of 32-bit integers in which every input bit flips every output bit half of the time."""
    x = _shift_xor(x.clone(), 16).mul_(MIX_1)
    return _shift_xor(_shift_xor(x, 15).mul_(_signed(MIX_2)), 16)


def _shift_xor(x: Tensor, bits: int) -> Tensor:
    """x ^ (x >> bits) in place, with a logical shift."""
    return x.bitwise_xor_((x >> bits) & ((1 << (32 - bits)) - 1))


def _signed(value: int) -> int:
    return value - 2**32 if value >= 2**31 else value
