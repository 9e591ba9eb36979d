"""Random inputs for dependency attention, and exact results for them in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_sas.kernels import dependency_attention
from megatron_sas.kernels.reference import attention_probs
from megatron_sas.kernels.sdpa import FILLER

OUTPUTS = ("out", "to_head", "to_dependent")
HEAD_KINDS = ("random", "near", "none", "one", "self", "beyond")
GRADIENT_KINDS = ("normal", "last_layer", "zero")


def device_of(backend: str) -> str:
    """Where tests of every backend run this one: our Triton kernels are interpreted only where there is no GPU."""
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


@dataclass
class Case:
    """Inputs whose values are exact in `dtype`, held in float64, and the gradients of the three outputs."""

    qkv: tuple[Tensor, Tensor, Tensor]  # (B, H, S, D)
    heads: Tensor  # (B, S)
    seqlens: Tensor | None  # (B,)
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None]
    dtype: torch.dtype

    def run(self, backend: str, dtype: torch.dtype, device: str = "cpu") -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """The three outputs, and the gradients of q, k and v, computed in `dtype` on `device`; all on the CPU."""
        qkv = [x.to(device, dtype, copy=True).requires_grad_() for x in self.qkv]
        seqlens = None if self.seqlens is None else self.seqlens.to(device)
        outputs = dependency_attention(*qkv, self.heads.to(device), seqlens=seqlens, backend=backend)
        gradients = tuple(None if g is None else g.to(device) for g in self.gradients)
        return tuple(x.cpu() for x in outputs), [g.cpu() for g in backward(outputs, gradients, qkv)]

    def run_plain(self, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, list[Tensor]]:
        """Output and gradients of torch's own attention, with no edges."""
        qkv = [x.to(device, dtype, copy=True).requires_grad_() for x in self.qkv]
        mask = None if self.seqlens is None else self.valid_keys()[:, None, None, :].to(device)
        out = F.scaled_dot_product_attention(*qkv, attn_mask=mask)
        gradient = None if self.gradients[0] is None else self.gradients[0].to(device)
        return out.cpu(), [g.cpu() for g in backward((out,), (gradient,), qkv)]

    def valid_keys(self) -> Tensor:
        """`(B, S)`: whether a key may be attended to; an empty sequence keeps its first."""
        return torch.arange(self.heads.shape[1]) < self.seqlens.clamp(min=1)[:, None]

    def valid_rows(self) -> Tensor:
        """`(B, 1, S, 1)`: whether a row of `out` is specified."""
        batch, seq = self.heads.shape
        lengths = torch.full((batch,), seq) if self.seqlens is None else self.seqlens
        return (torch.arange(seq) < lengths[:, None])[:, None, :, None]


def backward(outputs: tuple[Tensor, ...], gradients: tuple[Tensor | None, ...], inputs: list[Tensor]) -> list[Tensor]:
    """Gradients of the inputs, from the outputs whose gradient is not None."""
    pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, gradients, strict=True) if g is not None]
    found = torch.autograd.grad([o for o, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def make_heads(kind: str, batch: int, seq: int) -> Tensor:
    """int64 `(B, S)` heads of one of `HEAD_KINDS`; half of the tokens of a "random" or "near" one have none."""
    positions = torch.arange(seq).expand(batch, seq)
    without = torch.rand(batch, seq) < 0.5
    if kind == "random":
        return torch.where(without, -1, torch.randint(0, seq, (batch, seq)))
    if kind == "near":
        return torch.where(without, -1, (positions + torch.randint(-3, 4, (batch, seq))).clamp(0, seq - 1))
    if kind == "none":
        return torch.full((batch, seq), -1)
    if kind == "one":
        return torch.randint(0, seq, (batch, 1)).expand(batch, seq)
    if kind == "self":
        return positions
    return torch.randint(-5, 2 * seq + 5, (batch, seq))  # beyond: also outside of S and of the valid part


def make_case(
    seed: int,
    *,
    batch: int,
    num_heads: int,
    seq: int,
    dim: int,
    dtype: torch.dtype,
    kind: str = "near",
    uneven: bool = False,
    logit_scale: float = 1.0,
    gradient_kind: str = "normal",
    subset: tuple[bool, bool, bool] = (True, True, True),
) -> Case:
    """A random case. `subset`: which outputs have a gradient at all."""
    torch.manual_seed(seed)
    q, k, v = (torch.randn(batch, num_heads, seq, dim) for _ in range(3))
    q = q * logit_scale
    seqlens = None
    if uneven:
        seqlens = torch.randint(0, seq + 1, (batch,))
        seqlens[0] = (0, 1, seq)[seed % 3] if seq > 1 else 1
    heads = make_heads(kind, batch, seq)
    rounded = tuple(x.to(dtype).double() for x in (q, k, v))
    case = Case(rounded, heads, seqlens, (None, None, None), dtype)
    grad_out = torch.randn(batch, num_heads, seq, dim)
    if gradient_kind == "zero":
        grad_out = torch.zeros_like(grad_out)
    elif gradient_kind == "last_layer":  # the head reads 15 % of the positions, and the loss is a mean
        size = torch.rand(batch, 1, seq, 1) * 3 - 9
        grad_out = grad_out * (torch.rand(batch, 1, seq, 1) < 0.15) * 10**size
    grad_out = (grad_out * case.valid_rows()).to(dtype).double()
    grad_probs = [torch.randn(batch, num_heads, seq) * (1e-3 if gradient_kind == "last_layer" else 1) for _ in range(2)]
    gradients = (grad_out, *(g.double() for g in grad_probs))
    case.gradients = tuple(g if wanted else None for g, wanted in zip(gradients, subset, strict=True))
    return case


def term_sizes(case: Case, exact: tuple[Tensor, ...]) -> tuple[float, float]:
    """Norms of the terms of dq and dk that may cancel: δ's without signs, the entries' scale·g·k_c and scale·g·q_r."""
    q, k, _ = case.qkv
    scale = q.shape[-1] ** -0.5
    limit = torch.full((len(case.heads),), case.heads.shape[1]) if case.seqlens is None else case.seqlens
    other = torch.where((case.heads >= 0) & (case.heads < limit[:, None]), case.heads, 0)
    at_head = other[:, None, :, None].expand_as(q)
    in_q, in_k = [], []
    if case.gradients[0] is not None:
        probs = attention_probs(q, k, case.seqlens, scale)
        delta = (case.gradients[0].norm(dim=-1) * exact[0].detach().norm(dim=-1))[..., None] * scale
        in_q.append((delta * (probs @ k)).norm())
        in_k.append((probs.transpose(-1, -2) @ (delta * q)).norm())
    for transposed, grad, probs in zip((False, True), case.gradients[1:], exact[1:], strict=True):
        if grad is None:
            continue
        weight = (probs.detach() * grad * scale)[..., None]
        keys, queries = (k, q.gather(2, at_head)) if transposed else (k.gather(2, at_head), q)
        in_q.append((weight * keys).norm())
        in_k.append((weight * queries).norm())
    return float(sum(in_q)), float(sum(in_k))


def filler_sizes(case: Case) -> tuple[float, float, float]:
    """Largest norms that the filler of the sdpa backend can leave in dq, dk and dv, if it fills every row."""
    batch, num_heads, seq, dim = case.qkv[0].shape
    q, k, v = (float(x.norm(dim=-1).max()) for x in case.qkv)
    size = FILLER[case.dtype] * seq * (batch * num_heads) ** 0.5
    return 2 * size * v * k * dim**-0.5, 2 * size * v * q * dim**-0.5, size


def by_maps(
    qkv: list[Tensor], heads: Tensor, lengths: list[int], window: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The three outputs from maps, with loops over sets and tokens; heads `(B, sets, S)`."""
    q, k, v = qkv
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # (B, H, S, S)
    for b, length in enumerate(lengths):
        seen = torch.zeros(scores.shape[-2:], dtype=torch.bool)
        for i in range(len(seen)):
            before, after = window or (len(seen), len(seen))
            last = max(length, 1) if window is None or i < length else len(seen)
            seen[i, max(0, i - before) : min(i + after + 1, last)] = True
        scores[b] = scores[b].masked_fill(~seen, -torch.inf)
    maps = scores.softmax(-1)
    along = [[], []]
    for b, sets in enumerate(heads.tolist()):
        for edges in sets:
            for transposed, found in enumerate(along):
                entries = []
                for i, j in enumerate(edges):
                    valid = 0 <= j < lengths[b] and i < lengths[b]
                    row, column = (j, i) if transposed else (i, j)
                    entries.append(maps[b, :, row, column] if valid else 0 * maps[b, :, 0, 0])
                found.append(torch.stack(entries, -1))
    shape = (*heads.shape[:2], q.shape[1], heads.shape[2])
    return maps @ v, torch.stack(along[0]).view(shape), torch.stack(along[1]).view(shape)
