"""AdamW: torch's own, fused. Its options are fields of the section `train`."""

from __future__ import annotations

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
    return torch.optim.AdamW(
        decay_groups((parameter for _, parameter in parameters), train.weight_decay),
        lr=train.learning_rate,
        betas=train.adam_betas,
        eps=train.adam_eps,
        fused=True,
    )
