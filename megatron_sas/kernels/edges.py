"""Forward and backward of single entries of an attention map, given the logsumexp of its rows.

Token i depends on token j = heads[i]. The entry (i, j) is `to_head[i]`, the entry (j, i) is `to_dependent[i]`.
With g = p · ∂L/∂p for an entry p = P[r, c], the gradient of the scores is

    dS = P ∘ (dP - δ - t) + [g at the entries],    t_r = Σ of g over the entries in row r,

so a flash backward with δ replaced by δ + t, followed by dq_r += scale · g · k_c and dk_c += scale · g · q_r for each
entry, is exact (the softmax Jacobian applied to a sparse gradient).

Several sets of edges, heads `(B, sets, S)`, are as many single ones: their probabilities are stacked to
`(B, sets, H, S)`, and their gradients add up.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_sas.kernels.reference import Window, accumulation_dtype, in_window

HAS_TRITON = importlib.util.find_spec("triton") is not None


def rows_at(x: Tensor, heads: Tensor) -> Tensor:
    """`x[b, h, heads[b, i]]` for x `(B, H, S)` or `(B, H, S, D)`; row 0 where there is no edge."""
    heads = heads.clamp(min=0)
    if x.dim() == 3:
        return x.gather(2, heads[:, None, :].expand(-1, x.shape[1], -1))
    # index_select copies whole tokens (all heads at once), several times as fast as a gather.
    batch, _, seq, _ = x.shape
    tokens = x.transpose(1, 2)  # (B, S, H, D)
    flat = (torch.arange(batch, device=heads.device)[:, None] * seq + heads).flatten()
    return tokens.reshape(batch * seq, -1).index_select(0, flat).view(tokens.shape).transpose(1, 2)


def edge_probs(
    q: Tensor, k: Tensor, lse: Tensor, heads: Tensor, scale: float, window: Window = None
) -> tuple[Tensor, Tensor]:
    """`to_head`, `to_dependent` `(B, H, S)` in the accumulation dtype, from q, k `(B, H, S, D)` and lse `(B, H, S)`.

    With heads `(B, sets, S)` both are `(B, sets, H, S)`. Entries outside of the window are 0.
    """
    if heads.dim() == 3:
        along = [edge_probs(q, k, lse, one, scale, window) for one in heads.unbind(1)]
        return torch.stack([first for first, _ in along], 1), torch.stack([second for _, second in along], 1)
    dtype = accumulation_dtype(q.dtype)
    q, k = q.to(dtype), k.to(dtype)
    has_head = has_dependent = heads >= 0  # (B, S)
    if window is not None:
        tokens = torch.arange(heads.shape[1], device=heads.device)
        has_head = has_head & in_window(tokens, heads, window)
        has_dependent = has_dependent & in_window(heads, tokens, window)
    to_head = (q * rows_at(k, heads)).sum(-1) * scale - lse  # logarithms (B, H, S)
    to_dependent = (rows_at(q, heads) * k).sum(-1) * scale - rows_at(lse, heads)
    # Masked before exp: where there is no entry it may overflow, and 0 · inf in autograd's backward is not 0.
    to_head = torch.where(has_head[:, None, :], to_head, float("-inf"))
    to_dependent = torch.where(has_dependent[:, None, :], to_dependent, float("-inf"))
    return to_head.exp(), to_dependent.exp()


def row_sums(g_head: Tensor | None, g_dependent: Tensor | None, heads: Tensor | None) -> Tensor | None:
    """t `(B, H, S)`: the sum of g over the entries of each row of the map; None when there is no gradient at all."""
    if g_head is None and g_dependent is None:
        return None
    if heads.dim() == 3:
        return torch.stack([row_sums(*one) for one in _single_sets(g_head, g_dependent, heads)]).sum(0)
    if g_dependent is None:
        return g_head
    index = heads.clamp(min=0)[:, None, :].expand_as(g_dependent)  # g is 0 where there is no edge
    total = torch.zeros_like(g_dependent) if g_head is None else g_head.clone()
    return total.scatter_add_(2, index, g_dependent)


def add_entry_gradients_(
    grad_q: Tensor, grad_k: Tensor, q: Tensor, k: Tensor, heads: Tensor, scale: float, g_head: Tensor | None,
    g_dependent: Tensor | None,
) -> None:  # fmt: skip
    """Add dq_r += scale·g·k_c and dk_c += scale·g·q_r in place, for all entries (r, c).

    q, k and the gradients are `(B, H, S, D)` in any memory layout, the g `(B, H, S)`, or `(B, sets, H, S)` for heads
    `(B, sets, S)`, 0 where there is no edge.
    """
    if heads.dim() == 3:
        for one_head, one_dependent, one in _single_sets(g_head, g_dependent, heads):
            add_entry_gradients_(grad_q, grad_k, q, k, one, scale, one_head, one_dependent)
        return
    entry_adder(grad_q.device, grad_q.dtype)(grad_q, grad_k, q, k, heads, scale, g_head, g_dependent)


def entry_adder(device: torch.device, dtype: torch.dtype) -> Callable[..., None]:
    """Return what adds the entries of one set to such gradients: on GPUs our kernel, which has no float64."""
    if device.type == "cuda" and HAS_TRITON and dtype == torch.float32:
        from megatron_sas.kernels.triton import entries

        return entries.add_entry_gradients_
    return _add_nonzero_entries_


def _single_sets(
    g_head: Tensor | None, g_dependent: Tensor | None, heads: Tensor
) -> list[tuple[Tensor | None, Tensor | None, Tensor]]:
    """g `(B, H, S)` of both directions and heads `(B, S)`, set by set."""
    none = [None] * heads.shape[1]
    parts = (none if g is None else g.unbind(1) for g in (g_head, g_dependent))
    return list(zip(*parts, heads.unbind(1), strict=True))


def _add_nonzero_entries_(
    grad_q: Tensor, grad_k: Tensor, q: Tensor, k: Tensor, heads: Tensor, scale: float, g_head: Tensor | None,
    g_dependent: Tensor | None,
) -> None:  # fmt: skip
    """`add_entry_gradients_` in plain operations, for the entries (i, heads[i]), then for the transposed ones.

    In `max` mode all but one of the L·H maps have g = 0 at any one token, so only the entries with g ≠ 0 are touched.
    """
    for g, transposed in ((g_head, False), (g_dependent, True)):
        if g is None:
            continue
        batch, head, token = torch.nonzero(g, as_tuple=True)
        other = heads[batch, token]
        row, column = (other, token) if transposed else (token, other)
        weight = (g[batch, head, token] * scale).to(grad_q.dtype)[:, None]  # (entries, 1)
        keys, queries = k[batch, head, column].to(grad_q.dtype), q[batch, head, row].to(grad_q.dtype)  # (entries, D)
        # Several tokens may share a head: unlike index_add_, this sums them in a fixed order on every device.
        grad_q.index_put_((batch, head, row), weight * keys, accumulate=True)
        grad_k.index_put_((batch, head, column), weight * queries, accumulate=True)
