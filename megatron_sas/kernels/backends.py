"""The attention backends that there are. One is a module with `run` and `unsupported_reason`, and a line below."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_sas.kernels import chunked, fa4, flex, reference, sdpa, triton
from megatron_sas.kernels.reference import Window


def _takes_everything(q: Tensor, dropout_p: float, has_seqlens: bool, sets: int, window: Window) -> None:
    """No reason against any inputs."""


class Backend(NamedTuple):
    """One way to compute dependency attention."""

    run: Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]
    """`run(q, k, v, heads, seqlens, dropout_p, scale, window)`: the three outputs of `dependency_attention`.

    Arguments are checked, `scale` is a number, and `window` None or (keys before, keys after), narrower than the
    sequence.
    """
    unsupported_reason: Callable[[Tensor, float, bool, int, Window], str | None] = _takes_everything
    """`unsupported_reason(q, dropout_p, has_seqlens, sets, window)`: why `run` cannot take such inputs and so many sets
    of edges, in words that fit behind the backend's name, or None when it can. All five are given by position, so that
    a backend that does not know of one fails rather than ignores it."""
    output_and_lse: Callable[..., tuple[Tensor, Tensor]] | None = None
    """`output_and_lse(q, k, v, seqlens, scale, window)`: attention without dropout `(B, H, S, D)`, with its gradient,
    and the logsumexp `(B, H, S)` of the scores in nats, without one. None: the backend does not hand it out."""


def _flash_backend(name: str) -> Backend:
    """One of torch's own flash kernels, by its backend's name."""
    functions = (sdpa.run, sdpa.unsupported_reason, sdpa.output_and_lse)
    return Backend(*(functools.partial(function, backend=name) for function in functions))


BACKENDS: dict[str, Backend] = {
    "triton": Backend(triton.run, triton.unsupported_reason, triton.output_and_lse),
    "sdpa": _flash_backend("sdpa"),
    "cudnn": _flash_backend("cudnn"),
    "flex": Backend(flex.run, flex.unsupported_reason),
    "fa4": Backend(fa4.run, fa4.unsupported_reason),
    "chunked": Backend(chunked.run, output_and_lse=chunked.output_and_lse),
    "reference": Backend(reference.run),
}
"""By name: our kernels; torch's flash kernel of the device; cuDNN's; FlexAttention; FlashAttention-4; plain tensor
operations in bounded memory; plain tensor operations on whole maps."""

PREFERENCE = {"cuda": ("triton", "cudnn", "sdpa", "chunked"), "cpu": ("sdpa", "chunked")}
"""What `auto` tries, in this order, by kind of device. On CPU this is the order of speed (`benchmarks/cpu`)."""

MEASURED: dict[str, dict[str, list[str]]] = json.loads(Path(__file__).with_name("preference.json").read_text("utf-8"))
"""The same by architecture ("sm_90"), with ("dropout") and without ("no_dropout"), for GPUs that were measured;
`tools/check_gpu.py --write-preference` writes the file."""


def _architecture(index: int | None) -> str:
    """The architecture of a GPU, by default of the current one; "" where there is none."""
    if not torch.cuda.is_available():
        return ""
    return "sm_{}{}".format(*torch.cuda.get_device_capability(index))


if MEASURED and torch.cuda.is_available():  # else this would load torch's compiler, and CUDA, for nothing
    _architecture = torch.compiler.assume_constant_result(_architecture)


def _preference(device: torch.device, dropout_p: float) -> Sequence[str]:
    if device.type == "cuda" and MEASURED:
        orders = MEASURED.get(_architecture(device.index), {})
        if order := orders.get("dropout" if dropout_p > 0.0 else "no_dropout"):
            return order
    return PREFERENCE.get(device.type, ("chunked",))


def choose_backend(
    q: Tensor, dropout_p: float, *, has_seqlens: bool = False, sets: int = 1, window: Window = None
) -> str:
    """Return the backend that `auto` takes for such inputs: the first of `MEASURED` or `PREFERENCE` that can.

    Args:
        q: `(batch, heads, seq, head_dim)`; only its shape, dtype, device and whether it has a gradient count.
        dropout_p: dropout of attention probabilities.
        has_seqlens: whether sequences may be shorter than `seq`.
        sets: sets of edges.
        window: None, or how many keys before and after its position a query sees.
    """
    return next(
        name
        for name in _preference(q.device, dropout_p)
        if BACKENDS[name].unsupported_reason(q, dropout_p, has_seqlens, sets, window) is None
    )


def unsupported_reason(
    backend: str, q: Tensor, dropout_p: float, *, has_seqlens: bool = False, sets: int = 1, window: Window = None
) -> str | None:
    """Return why a backend cannot take such inputs (as for `choose_backend`), or None when it can, as "auto" always."""
    if backend == "auto":
        return None
    return BACKENDS[backend].unsupported_reason(q, dropout_p, has_seqlens, sets, window)
