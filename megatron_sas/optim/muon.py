"""Muon (Jordan et al. 2024) for the matrices of the layers, AdamW for embeddings, head, LayerNorms and biases.

`torch.optim.Muon` makes the update of a matrix orthogonal by Newton-Schulz iterations, in bfloat16. The projection to
queries, keys and values is one matrix here, and so is its update. Options of AdamW are those of `train`; its weight
decay is for the matrices of both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from megatron_sas.core.settings import Section
from megatron_sas.optim import adamw

if TYPE_CHECKING:
    from megatron_sas.optim.section import TrainSection

TITLE = "Muon for matrices of the layers, AdamW for the rest"


class MuonSection(Section):
    """Options of train.optimizer muon, for matrices of the layers; AdamW's, for the rest, are those of train."""

    momentum: float = Field(0.95, description="decay of the mean of gradients", ge=0, lt=1)
    nesterov: bool = Field(True, description="look ahead along the newest gradient")
    adjust_lr: Literal["match_rms_adamw", "original"] = Field(
        "match_rms_adamw",
        description="size of updates: AdamW's at the same learning rate, or Jordan's, which wants another rate",
    )


OPTIONS = MuonSection


def unsupported_reason(zero_stage: int) -> str | None:
    """Newton-Schulz needs whole matrices, of which ZeRO keeps slices."""
    if not hasattr(torch.optim, "Muon"):
        return f"torch {torch.__version__} has no torch.optim.Muon; install a newer torch, or choose adamw"
    if zero_stage > 0:
        return f"ZeRO stage {zero_stage} cuts matrices into slices, and it needs whole ones; set zero_stage: 0"
    return None


def _is_muons(name: str, tensor: Tensor) -> bool:
    return name.startswith("layers.") and tensor.dim() == 2


def initial_state(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """One moment for matrices of the layers, AdamW's state for the rest."""
    if not _is_muons(name, tensor):
        return adamw.initial_state(name, tensor)
    return {"momentum_buffer": torch.zeros_like(tensor, memory_format=torch.preserve_format)}


def build(
    parameters: Sequence[tuple[str, nn.Parameter]], train: TrainSection, options: MuonSection | None
) -> torch.optim.Optimizer:
    """The optimizer of these parameters, with the default options if none are given."""
    options = options or MuonSection()
    matrices = [parameter for name, parameter in parameters if _is_muons(name, parameter)]
    rest = [(name, parameter) for name, parameter in parameters if not _is_muons(name, parameter)]
    muons = [
        torch.optim.Muon(
            [matrix],
            lr=train.learning_rate,
            weight_decay=train.weight_decay,
            momentum=options.momentum,
            nesterov=options.nesterov,
            adjust_lr_fn=options.adjust_lr,
        )
        for matrix in matrices
    ]
    return MuonWithAdamW(muons, adamw.build(rest, train, None))


class MuonWithAdamW(torch.optim.Optimizer):
    """Both as one optimizer, with the parameter groups and the state of its parts.

    Muon knows nothing of `found_inf`. Therefore each matrix has a `torch.optim.Muon` of its own: its step is made, and
    taken back on the device where the update is not finite, so that no more than one matrix is held twice.
    """

    def __init__(self, muons: Sequence[torch.optim.Optimizer], rest: torch.optim.Optimizer) -> None:
        self.muons, self.rest = muons, rest
        parts = (*muons, rest)
        super().__init__([group for part in parts for group in part.param_groups], {})
        for part in parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One update, or none where `found_inf` is not 0."""
        found_inf = getattr(self, "found_inf", None)
        for muon in self.muons:
            if found_inf is None:
                muon.step()
                continue
            (matrix,) = muon.param_groups[0]["params"]
            if not self.state[matrix]:  # as Muon itself would begin
                self.state[matrix] = {"momentum_buffer": torch.zeros_like(matrix)}
            kept = (matrix, self.state[matrix]["momentum_buffer"])
            before = [tensor.clone() for tensor in kept]
            muon.step()
            for tensor, old in zip(kept, before, strict=True):
                torch.where(found_inf == 0, tensor, old, out=tensor)
        self.rest.found_inf = found_inf
        self.rest.step()
