"""NVIDIA apex's LayerNorm in place of torch's, where apex is really built."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor, nn


def apex_layer_norm() -> type[nn.Module] | None:
    """apex's `FusedLayerNorm` if its CUDA extension is there, else None.

    PyPI's `apex` is a toolkit for web sites, and NVIDIA's can be installed without its kernels; so it is the parts that
    are looked for, not the name.
    """
    try:
        importlib.import_module("fused_layer_norm_cuda")
        return importlib.import_module("apex.normalization").FusedLayerNorm
    except (ImportError, AttributeError):
        return None


def _without_autocast(apex: type[nn.Module]) -> type[nn.Module]:
    """apex's layer with torch's dtypes: under autocast torch's computes in float32, apex's in bfloat16."""

    class FusedLayerNorm(apex):
        def forward(self, x: Tensor) -> Tensor:
            if not torch.is_autocast_enabled(x.device.type):
                return super().forward(x)
            with torch.autocast(x.device.type, enabled=False):
                return super().forward(x.float())

    return FusedLayerNorm


def use_apex_layer_norm_(module: nn.Module) -> int:
    """Replace every `nn.LayerNorm` with a bias inside `module` by apex's, with the same parameters; returns how many.

    Only for CUDA without `torch.compile`, which fuses LayerNorm with its neighbours and so does better.
    """
    apex = apex_layer_norm()
    if apex is None:
        return 0
    fused = _without_autocast(apex)
    count = 0
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.LayerNorm and child.bias is not None:  # which apex's always has
                replacement = fused(child.normalized_shape, eps=child.eps)
                replacement.weight, replacement.bias = child.weight, child.bias
                setattr(parent, name, replacement)
                count += 1
    return count
