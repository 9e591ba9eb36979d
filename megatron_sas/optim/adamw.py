"""AdamW: torch's own, fused. Its options are fields of the section `train`."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megatron_sas.core.settings import Section
from megatron_sas.optim.param_groups import decay_groups

if TYPE_CHECKING:
    from megatron_sas.optim.section import TrainSection

TITLE = "AdamW"
OPTIONS = None


class AdamW(torch.optim.AdamW):
    """Without what torch wraps around the step, which loads its compiler: seconds at the first one."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update, or none where `found_inf` is not 0."""
        _plain_step(self)


_plain_step = inspect.unwrap(torch.optim.AdamW.step)


def unsupported_reason(zero_stage: int) -> str | None:
    """None: every ZeRO stage can have it, since it treats every number alike."""
    return None


def initial_state(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Two moments and the number of updates, for a parameter or any part of parameters."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=tensor.device),
        "exp_avg": torch.zeros_like(tensor, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(tensor, memory_format=torch.preserve_format),
    }


def build(
    parameters: Sequence[tuple[str, nn.Parameter]], train: TrainSection, options: Section | None
) -> torch.optim.Optimizer:
    """The optimizer of these parameters. The fused implementation is the one that obeys `found_inf`."""
    return AdamW(
        decay_groups((parameter for _, parameter in parameters), train.weight_decay),
        lr=train.learning_rate,
        betas=train.adam_betas,
        eps=train.adam_eps,
        fused=True,
    )
