"""The optimizers that there are. One is a module with the names of `OptimizerModule`, and a line in `OPTIMIZERS`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from megatron_sas.core.settings import Section
from megatron_sas.optim import adamw, muon

if TYPE_CHECKING:
    from megatron_sas.optim.section import TrainSection


class OptimizerModule(Protocol):
    """What the engine, checkpoints and the estimate of memory need to know of an optimizer."""

    TITLE: str  # in reports
    OPTIONS: type[Section] | None  # its own section of the configuration; None: `train` has all

    def unsupported_reason(self, zero_stage: int) -> str | None:
        """Why it can't be had with a ZeRO stage, and what to do; None when it can."""

    def initial_state(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """What it keeps of the parameter `name` before the first update: moments of its shape, which checkpoints hold,
        and maybe the scalar `step`. Where ZeRO cuts parameters into flat parts, `tensor` is one and `name` is ""."""

    def build(
        self, parameters: Sequence[tuple[str, nn.Parameter]], train: TrainSection, options: Section | None
    ) -> torch.optim.Optimizer:
        """The optimizer of all parameters, given by name.

        Its step changes nothing, on the device and without the host's waiting, where its attribute `found_inf`, a
        float32 scalar, is not 0: so updates that are not finite are skipped.
        """


OPTIMIZERS: dict[str, OptimizerModule] = {
    "adamw": adamw,
    "muon": muon,
}


def without_compiler() -> None:
    """Have optimizers built without torch's compiler, which they load to switch it off for themselves.

    That takes 1.5 s of CPU. Nothing that is compiled builds an optimizer.
    """
    function = getattr(torch.optim.Optimizer.add_param_group, "__wrapped__", None)
    if function is not None:
        vars(function).setdefault("__dynamo_disable", function)


def moment_names(optimizer: OptimizerModule, name: str, parameter: Tensor) -> list[str]:
    """The names of what `moments_of` returns. Its tensors have torch load code for half a second, these do not."""
    return [key for key in optimizer.initial_state(name, torch.zeros((1,) * parameter.dim())) if key != "step"]


def moments_of(optimizer: OptimizerModule, name: str, parameter: Tensor) -> dict[str, Tensor]:
    """The moments that an optimizer keeps of a parameter, as tensors without memory."""
    state = optimizer.initial_state(name, torch.empty_like(parameter, device="meta", dtype=torch.float32))
    return {key: value for key, value in state.items() if key != "step"}
