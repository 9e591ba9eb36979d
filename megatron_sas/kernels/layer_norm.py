"""NVIDIA apex's LayerNorm in place of torch's, where apex is really built."""

from __future__ import annotations

import importlib

from torch import nn


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


def use_apex_layer_norm_(module: nn.Module) -> int:
    """Replace every `nn.LayerNorm` inside `module` by apex's, with the same parameters; returns how many.

    Only for CUDA without `torch.compile`, which fuses LayerNorm with its neighbours and so does better.
    """
    fused = apex_layer_norm()
    if fused is None:
        return 0
    count = 0
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.LayerNorm:
                replacement = fused(child.normalized_shape, eps=child.eps)
                replacement.weight, replacement.bias = child.weight, child.bias
                setattr(parent, name, replacement)
                count += 1
    return count
