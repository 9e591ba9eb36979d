"""`x · weightᵀ + bias` by the fastest routine that torch brings.

On CPUs torch multiplies float32 matrices with MKL, which keeps AVX-512 for Intel's own processors; oneDNN, which torch
brings as well, does not ask who made the processor. On AMD's with AVX-512 (Zen 5) it is more than twice as fast, on
those without (Zen 3) MKL is up to 25 % faster. A training run therefore measures both when it begins
(`measure_library`) and keeps its choice (`use_library`), because they round differently. Elsewhere oneDNN is used where
there is AVX-512.
"""

from __future__ import annotations

import functools
import time
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Library = Literal["onednn", "torch"]
WORTH = 1.2
"""How much faster than torch's own product oneDNN's must be to be chosen: near a tie, noise would choose, and two runs
of one seed would differ."""
_chosen: Library | None = None


def use_library(library: Library | None) -> None:
    """Choose what multiplies in this process from now on; None: oneDNN where there is AVX-512."""
    global _chosen
    _chosen = library


def library_in_use() -> Library:
    """What multiplies float32 matrices on the CPU in this process."""
    wanted = _chosen or ("onednn" if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else "torch")
    return wanted if _has_onednn() else "torch"


def measure_library(rounds: int = 7) -> Library:
    """Which library multiplies faster on this machine with the threads that torch has now; takes some 20 ms.

    Of a fixed size, so that the answer depends on the machine and not on the model.
    """
    if not _has_onednn():
        return "torch"
    x, weight, best = torch.ones(256, 512), torch.ones(512, 512), {F.linear: float("inf"), _product: float("inf")}
    with torch.no_grad():
        for _ in range(rounds):
            for product in best:
                started = time.perf_counter()
                product(x, weight)
                best[product] = min(best[product], time.perf_counter() - started)
    return "onednn" if best[F.linear] > WORTH * best[_product] else "torch"


class Linear(nn.Linear):
    """`nn.Linear` whose product is `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """`(…, in)` to `(…, out)`."""
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: `(…, in)` and `(out, in)` to `(…, out)`, differentiable once where oneDNN computes it.

    oneDNN, where it is the `library_in_use`, computes float32 on a CPU, outside autocast and `torch.compile`, unless
    torch is told not to use it (`torch.backends.mkldnn.flags(enabled=False)`); everything else is `F.linear` itself.
    """
    if not _suits_onednn(x, weight):
        return F.linear(x, weight, bias)
    return _OneDnnLinear.apply(x, weight, bias)


def _suits_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and library_in_use() == "onednn"
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > 0
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
    )


@functools.cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x · weightᵀ + bias` of matrices of any strides, without autograd."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):  # noqa: ANN001
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # noqa: ANN001
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad, rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        grad_x = _product(grad, weight.t()).view(x.shape) if needs_x else None
        grad_weight = _weight_gradient(grad, rows) if needs_weight else None
        return grad_x, grad_weight, grad.sum(0) if needs_bias else None


def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """`gradᵀ · x`, `(out, in)`, of `(M, out)` and `(M, in)`; a first factor with strides is copied: the smaller one."""
    if grad.shape[1] <= x.shape[1]:
        return _product(grad.t(), x.t())
    return _product(x.t(), grad.t()).t().contiguous()
