"""Which device a tool computes on, and in which precision; torch is imported when it is asked for one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_sas.core.cli import InputError

if TYPE_CHECKING:
    import torch

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
"""Precisions in which models are written: the names that users give to torch's."""
DEVICE_HELP = "cpu, cuda or cuda:N (default: a GPU if there is one)"


def choose_device(name: str | None) -> torch.device:
    """The named device; by default a GPU if there is one, else the CPU. Raises `InputError` if it is not there.

    A GPU that is named by number becomes the current one, where kernels run and libraries allocate.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise InputError(f"--device: {name!r} is not available here; use cpu or cuda[:N]") from None
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device
