"""Dependency attention on torch's own flash kernels, unmodified: the CPU's, FlashAttention-2, cuDNN's.

A flash backward computes δ_i = Σ_d dO_id · O_id from the tensors it is given and uses O for nothing else. Handing it

    O' = O + (t_i / ‖dO_i‖²) · dO_i        so that dO_i · O'_i = δ_i + t_i

therefore yields the dense part of the exact gradient (see `edges.py`); the entries themselves are added afterwards.
Rows of dO that are (almost) zero are the normal case, not a rare one: the LM head reads only masked positions, so
about 85 % of the last layer's rows are exactly zero. Such a row is first replaced by `FILLER` in one component, which
changes no gradient visibly (it enters dV and dP linearly, at 1e-15) but gives O' something to be multiplied with.

On a CPU the backward leaves out the rows with neither dO nor t, which give no gradient, where these are many.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_sas.kernels.cpu_window import CpuFlashInWindow
from megatron_sas.kernels.edges import add_entry_gradients_, edge_probs, row_sums
from megatron_sas.kernels.reference import Window, accumulation_dtype, key_mask, valid_heads

FILLER = {torch.float32: 2.0**-50, torch.bfloat16: 2.0**-50, torch.float64: 2.0**-200}
"""By dtype: far below any gradient's rounding, while 1 / FILLER, to which O' may grow, is far from overflow."""

DENSE = 0.6
"""Share of the rows from which on a backward takes all of them: the others' are copied."""

Rest = tuple[Any, ...]  # what a kernel's backward wants back from its forward besides out and lse

_aten = torch.ops.aten


class CpuFlash:
    """torch's flash kernel for the CPU: any floating dtype, key masks, no dropout."""

    @staticmethod
    def unsupported_reason(q: Tensor, dropout_p: float, has_seqlens: bool) -> str | None:
        """Return why this kernel cannot take such inputs, or None when it can."""
        if q.device.type != "cpu":
            return f"torch's CPU flash kernel cannot take tensors on {q.device.type}"
        if dropout_p > 0.0:
            return "torch's CPU flash kernel has no attention dropout"
        return None

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, scale: float
    ) -> tuple[Tensor, Tensor, Rest]:
        """`out` `(B, H, S, D)`, `lse` `(B, H, S)` float32 (float64 for float64), and the rest."""
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=mask, scale=scale)
        return out, lse, ()

    @staticmethod
    def backward(
        grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor, rest: Rest,
        dropout_p: float, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of q, k and v."""
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, q, k, v, out, lse, 0.0, False, attn_mask=mask, scale=scale
        )


class CudaFlash:
    """FlashAttention-2 as torch brings it: bfloat16 (float16 is refused below), dropout, no masks."""

    @staticmethod
    def unsupported_reason(q: Tensor, dropout_p: float, has_seqlens: bool) -> str | None:
        """Return why this kernel cannot take such inputs, or None when it can."""
        return _unsupported_on_cuda("FlashAttention-2", q, has_seqlens, 256)

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, scale: float
    ) -> tuple[Tensor, Tensor, Rest]:
        """See `CpuFlash`."""
        out, lse, cum_q, cum_k, max_q, max_k, rng, unused, _ = _aten._scaled_dot_product_flash_attention(
            q, k, v, dropout_p, False, False, scale=scale
        )
        return out, lse, (cum_q, cum_k, max_q, max_k, rng, unused)

    @staticmethod
    def backward(
        grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor, rest: Rest,
        dropout_p: float, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of q, k and v."""
        cum_q, cum_k, max_q, max_k, rng, unused = rest
        return _aten._scaled_dot_product_flash_attention_backward(
            grad_out, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout_p, False, rng, unused, scale=scale
        )


class CudnnFlash:
    """cuDNN's flash kernels: bfloat16 (float16 is refused below), dropout, no masks."""

    @staticmethod
    def unsupported_reason(q: Tensor, dropout_p: float, has_seqlens: bool) -> str | None:
        """Return why this kernel cannot take such inputs, or None when it can."""
        reason = _unsupported_on_cuda("cuDNN's flash kernel", q, has_seqlens, 128)
        if reason is None and q.shape[2] == 1:
            return "cuDNN's flash kernel takes no sequences of one token"
        if reason is None and not torch.backends.cudnn.is_available():
            return "this build of torch has no cuDNN"
        return reason

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, scale: float
    ) -> tuple[Tensor, Tensor, Rest]:
        """See `CpuFlash`."""
        out, lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = _aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, dropout_p, False, False, scale=scale
        )
        return out, lse.view(q.shape[:3]), (cum_q, cum_k, max_q, max_k, seed, offset)

    @staticmethod
    def backward(
        grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor, rest: Rest,
        dropout_p: float, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of q, k and v."""
        cum_q, cum_k, max_q, max_k, seed, offset = rest
        return _aten._scaled_dot_product_cudnn_attention_backward(
            grad_out, q, k, v, out, lse[..., None], seed, offset, None, cum_q, cum_k, max_q, max_k, dropout_p, False,
            scale=scale,
        )  # fmt: skip


Kernel = type[CpuFlash] | type[CudaFlash] | type[CudnnFlash] | CpuFlashInWindow


def _unsupported_on_cuda(name: str, q: Tensor, has_seqlens: bool, largest_dim: int) -> str | None:
    if q.device.type != "cuda":
        return f"{name} needs a GPU, not tensors on {q.device.type}"
    if q.dtype != torch.bfloat16:
        return f"{name} is used for bfloat16 only, not {q.dtype}"
    if q.shape[3] % 8 or q.shape[3] > largest_dim:
        return f"{name} takes head dimensions that are multiples of 8 up to {largest_dim}, not {q.shape[3]}"
    if has_seqlens:
        return f"{name} is used without seqlens"
    return None


def kernel_named(backend: str, q: Tensor, window: Window = None) -> Kernel:
    """The kernel behind the backend "cudnn", or "sdpa" on q's device; only the CPU's has windows."""
    if backend == "cudnn":
        return CudnnFlash
    if q.device.type == "cuda":
        return CudaFlash
    return CpuFlash if window is None else CpuFlashInWindow(window, q.shape[2])


def unsupported_reason(
    q: Tensor, dropout_p: float, has_seqlens: bool, sets: int, window: Window, *, backend: str
) -> str | None:
    """Return why `backend`, "sdpa" or "cudnn", cannot take such inputs, or None when it can."""
    if q.dtype == torch.float16:
        return "float16 cannot hold the substituted output (it spans 2^±50); use bfloat16 or float32"
    if q.numel() == 0:
        return "torch's flash kernels cannot take empty tensors"
    kernel = kernel_named(backend, q)
    if window is not None and kernel is not CpuFlash:
        return "torch's flash kernels for GPUs are used without a window"
    return kernel.unsupported_reason(q, dropout_p, has_seqlens)


def run(
    q: Tensor, k: Tensor, v: Tensor, heads: Tensor | None, seqlens: Tensor | None, dropout_p: float, scale: float,
    window: Window, *, backend: str,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """See `Backend.run`; `backend` is "sdpa" or "cudnn"."""
    heads = None if heads is None else valid_heads(heads, seqlens)
    kernel = kernel_named(backend, q, window)
    mask = _mask(kernel, seqlens, q)
    return _FlashDependencyAttention.apply(q, k, v, heads, mask, dropout_p, scale, window, kernel)[:3]


def output_and_lse(
    q: Tensor, k: Tensor, v: Tensor, seqlens: Tensor | None, scale: float, window: Window, *, backend: str
) -> tuple[Tensor, Tensor]:
    """See `Backend.output_and_lse`; `backend` is "sdpa" or "cudnn"."""
    kernel = kernel_named(backend, q, window)
    mask = _mask(kernel, seqlens, q)
    out, _, _, lse = _FlashDependencyAttention.apply(q, k, v, None, mask, 0.0, scale, window, kernel)
    return out, lse


def flash_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """`out` `(B, H, R, D)` of R queries, by the CPU's kernel; `mask` is additive, `(B, 1, R, S)`."""
    return _FlashDependencyAttention.apply(q, k, v, None, mask, 0.0, scale, None, CpuFlash)[0]


def _mask(kernel: Kernel, seqlens: Tensor | None, q: Tensor) -> Tensor | None:
    """The mask as the kernel takes it: of keys `(B, 1, S, S)` with strides of 0, so that its memory is `(B, S)`."""
    if isinstance(kernel, CpuFlashInWindow):
        return kernel.mask(seqlens, q)
    mask = key_mask(seqlens, q.shape[2], q.dtype)
    return None if mask is None else mask.expand(-1, 1, q.shape[2], -1)


class _FlashDependencyAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, heads, mask, dropout_p, scale, window, kernel):  # noqa: ANN001
        out, lse, rest = kernel.forward(q, k, v, mask, dropout_p, scale)
        to_head, to_dependent = (None, None) if heads is None else edge_probs(q, k, lse, heads, scale, window)
        tensors = [x for x in rest if isinstance(x, Tensor)]
        ctx.save_for_backward(q, k, v, heads, mask, out, lse, to_head, to_dependent, *tensors)
        ctx.rest = [None if isinstance(x, Tensor) else x for x in rest]
        ctx.is_tensor = [isinstance(x, Tensor) for x in rest]
        ctx.dropout_p, ctx.scale, ctx.kernel = dropout_p, scale, kernel
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(lse)
        return out, to_head, to_dependent, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_to_head, grad_to_dependent, _):  # noqa: ANN001
        q, k, v, heads, mask, out, lse, to_head, to_dependent, *tensors = ctx.saved_tensors
        saved = iter(tensors)
        rest = tuple(next(saved) if saved_one else x for x, saved_one in zip(ctx.rest, ctx.is_tensor, strict=True))
        scale = ctx.scale
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        g_head = None if grad_to_head is None else to_head * grad_to_head
        g_dependent = None if grad_to_dependent is None else to_dependent * grad_to_dependent
        row_sum = row_sums(g_head, g_dependent, heads)
        one_mask = mask is None or mask.stride(2) == 0  # for all rows
        rows = _rows_with_gradient(grad_out, row_sum) if ctx.kernel is CpuFlash and one_mask else None
        queries, t = q, row_sum
        if rows is not None:
            queries, grad_out, out, lse = (x[rows] for x in (q, grad_out, out, lse))  # (B, H, R, D); lse (B, H, R)
            t = None if row_sum is None else row_sum[rows]
            mask = None if mask is None else mask[:, :, : lse.shape[2]]
        if t is not None:
            grad_out, out = substitute(grad_out, out, t)
        grad_q, grad_k, grad_v = ctx.kernel.backward(
            grad_out, queries, k, v, mask, out, lse, rest, ctx.dropout_p, scale
        )  # fmt: skip
        if rows is not None:
            grad_q = torch.zeros_like(q).index_put_(rows, grad_q)
        if row_sum is not None:
            # The entries are added in float32 before rounding to q's dtype.
            dtype = accumulation_dtype(q.dtype)
            grad_q, grad_k = grad_q.to(dtype), grad_k.to(dtype)
            add_entry_gradients_(grad_q, grad_k, q, k, heads, scale, g_head, g_dependent)
            grad_q, grad_k = grad_q.to(q.dtype), grad_k.to(q.dtype)
        return grad_q, grad_k, grad_v, *(None,) * 6


def _rows_with_gradient(grad_out: Tensor, row_sum: Tensor | None) -> tuple[Tensor, Tensor, Tensor] | None:
    """The index of R rows of every map, `(B, H, R)`: those where dO or t is not 0, and others. None for all rows.

    `grad_out` is `(B, H, S, D)`, `row_sum` t `(B, H, S)` or None. A row of dO is 0 when its norm is: what underflows
    there is far below any gradient's rounding. Compiled code takes all rows, because R is a number.
    """
    if torch.compiler.is_compiling():
        return None
    batch, num_heads, seq, _ = grad_out.shape
    limit = int(DENSE * seq)
    if torch.linalg.vector_norm(grad_out[:, 0], dim=-1).count_nonzero() > batch * limit:  # one head tells
        return None
    wanted = torch.linalg.vector_norm(grad_out, dim=-1) != 0  # (B, H, S)
    if row_sum is not None:
        wanted |= row_sum != 0
    most = max(int(wanted.sum(dim=-1).max()), 1)
    if most > limit:
        return None
    maps = torch.arange(batch)[:, None, None], torch.arange(num_heads)[:, None]
    return *maps, first_true(wanted, most)


def first_true(wanted: Tensor, most: int) -> Tensor:
    """int64 `(…, most)`: the indices of the true elements of bool `(…, S)` in order, then others; all distinct."""
    return wanted.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :most]


def substitute(grad_out: Tensor, out: Tensor, row_sum: Tensor) -> tuple[Tensor, Tensor]:
    """dO and O' such that Σ_d dO_id · O'_id = δ_i + t_i; all `(B, H, S, D)`, `row_sum` t `(B, H, S)`.

    Rows with t_i = 0 are returned unchanged, so plain attention keeps its own bits.
    """
    dtype = accumulation_dtype(out.dtype)
    size = FILLER[grad_out.dtype]
    square = torch.linalg.vector_norm(grad_out, dim=-1, dtype=dtype).square_()  # (B, H, S); 0 if it underflows
    fill = (square < size**2) & (row_sum != 0)
    filler = torch.zeros(grad_out.shape[-1], dtype=grad_out.dtype, device=grad_out.device)
    filler[0] = size
    grad_out = torch.where(fill[..., None], filler, grad_out)
    square = torch.where(fill, size**2, square)
    factor = torch.where(row_sum != 0, row_sum / square, 0.0)
    return grad_out, torch.addcmul(out.to(dtype), factor[..., None], grad_out.to(dtype)).to(out.dtype)
