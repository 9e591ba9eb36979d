"""How much single heads attend along edges i → heads[i]: what terms that look at such edges share.

E = {(i, heads[i])} are the edges of a sequence; α[l, h, i, j] the attention probabilities before dropout.

    max      R = Σ_E max_{l,h} α[l,h,i,j] + Σ_E max_{l,h} α[l,h,j,i]            (the paper's)
    uniform  R = (Σ_{E,l,h} α[l,h,i,j]^p)^{1/p} + (Σ_{E,l,h} α[l,h,j,i]^p)^{1/p}

The directions take their maxima separately and either can be switched off.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_sas.model.base import ModelOutput
from megatron_sas.objective.base import EDGES, Batch, Counts, TermSection

DIRECTIONS = ("both", "to_head", "to_dependent")

PER_EDGE = "{}_per_edge"
"""The key, with a term's name, of the mean of R over edges and directions."""


class EdgeSection(TermSection):
    """The settings of a term along edges."""

    mode: Literal["max", "uniform"] = Field("max", description="R: best (layer, head) per edge, or all of them")
    p: float = Field(1.0, description="exponent of mode uniform", ge=1)
    directions: Literal["both", "to_head", "to_dependent"] = Field("both", description="attention that counts")
    reduction: Literal["sequence", "sum"] = Field(
        "sequence", description="mean over the global batch, or the paper's sum over the micro-batch"
    )


class EdgeTerm:
    """A `Term` along edges; a subclass says which."""

    needs = frozenset({EDGES})

    def __init__(self, section: EdgeSection, special_ids: Sequence[int] = ()) -> None:
        self.section, self.special_ids, self.reduction = section, tuple(special_ids), section.reduction

    def describe(self) -> str:
        """Mode, directions and reduction in words."""
        section = self.section
        mode = f"{section.mode}, p {section.p:g}" if section.mode == "uniform" else section.mode
        return f"mode {mode}, directions {section.directions}, reduction {section.reduction}"

    def __call__(self, output: ModelOutput, batch: Batch) -> Tensor:
        """R of every sequence, `(B,)`."""
        section = self.section
        return attention_along(
            output.to_head, output.to_dependent, mode=section.mode, p=section.p, directions=section.directions
        )

    def metrics(self, total: float, counts: Counts) -> dict[str, float]:
        """R, and in mode max its mean over edges and directions."""
        divisor = counts.sequences if self.reduction == "sequence" else counts.micro_batches
        values = {self.name: total / divisor}
        if self.section.mode == "max" and counts.edges:
            directions = 2 if self.section.directions == "both" else 1
            values[PER_EDGE.format(self.name)] = total / (directions * counts.edges)
        return values


def attention_along(
    to_head: Sequence[Tensor],
    to_dependent: Sequence[Tensor],
    *,
    mode: str = "max",
    p: float = 1.0,
    directions: str = "both",
) -> Tensor:
    """R of every sequence, `(B,)` in the probabilities' dtype.

    Args:
        to_head, to_dependent: one `(B, H, S)` per layer, 0 where there is no edge (as `dependency_attention` returns).
        mode: "max" or "uniform".
        p: exponent of `uniform`, at least 1.
        directions: "both", "to_head" (dependents to heads only) or "to_dependent" (heads to dependents only).
    """
    parts = []
    if directions in ("both", "to_head"):
        parts.append(_one_direction(to_head, mode, p))
    if directions in ("both", "to_dependent"):
        parts.append(_one_direction(to_dependent, mode, p))
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


class _JoinLayers(torch.autograd.Function):
    """`(B, L·H, S)` from one `(B, H, S)` per layer, layer by layer.

    The gradients are contiguous. Those of `torch.cat` are not, and compiled layers would copy them, one by one.
    """

    @staticmethod
    def forward(ctx, *probs):  # noqa: ANN001
        ctx.layers = len(probs)
        return torch.cat(probs, dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # noqa: ANN001
        return grad.unflatten(1, (ctx.layers, -1)).transpose(0, 1).contiguous().unbind(0)


def _one_direction(probs: Sequence[Tensor], mode: str, p: float) -> Tensor:
    stacked = _JoinLayers.apply(*probs)
    if mode == "max":
        # argmax returns the first of equal maxima, so ties go to the lowest (layer, head); amax would share the
        # gradient among them.
        winner = stacked.detach().argmax(dim=1, keepdim=True)
        return stacked.gather(1, winner).squeeze(1).sum(dim=1)
    if p == 1.0:
        return stacked.sum(dim=(1, 2))
    # Relative to the largest: small probabilities to a high power are 0 in float32.
    largest = stacked.detach().amax(dim=(1, 2))
    positive = largest > 0  # the p-th root has an infinite slope at 0: sequences without edges take another branch
    total = (stacked / torch.where(positive, largest, 1.0)[:, None, None]).pow(p).sum(dim=(1, 2))
    return largest * torch.where(positive, total, 1.0).pow(1.0 / p)
