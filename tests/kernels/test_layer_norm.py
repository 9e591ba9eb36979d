"""apex is used where its kernels are, and nothing else that goes by its name."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from megatron_sas.kernels.layer_norm import apex_layer_norm, use_apex_layer_norm_
from megatron_sas.model.bert import Bert
from megatron_sas.model.config import BertConfig


class FusedLayerNorm(nn.LayerNorm):
    """apex's has this constructor and these parameters."""

    def __init__(self, normalized_shape, eps=1e-5, elementwise_affine=True, memory_efficient=False):
        super().__init__(normalized_shape, eps=eps, elementwise_affine=elementwise_affine)


@pytest.fixture
def apex(monkeypatch):
    """NVIDIA's package, with its compiled part."""
    normalization = ModuleType("apex.normalization")
    normalization.FusedLayerNorm = FusedLayerNorm
    for name, module in (("apex", ModuleType("apex")), ("apex.normalization", normalization)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "fused_layer_norm_cuda", ModuleType("fused_layer_norm_cuda"))


def make_bert() -> Bert:
    torch.manual_seed(0)
    return Bert(BertConfig(num_layers=2, hidden_size=16, num_heads=2, intermediate_size=32, vocab_size=50)).eval()


def test_replaces_every_layer_norm(apex):
    bert, ids = make_bert(), torch.arange(12).view(2, 6)
    before, names = bert(ids).hidden, list(bert.state_dict())
    assert use_apex_layer_norm_(bert) == 2 * 2 + 2
    assert not any(type(module) is nn.LayerNorm for module in bert.modules())
    assert list(bert.state_dict()) == names
    assert torch.equal(bert(ids).hidden, before)
    assert bert.layers[0].mlp_norm.eps == 1e-12


def test_under_autocast_the_residual_stream_stays_float32(apex, monkeypatch):
    """apex's function casts its arguments to autocast's dtype, unlike torch's."""

    def forward(self, x):
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        parts = (part.to(dtype) for part in (x, self.weight, self.bias))
        return nn.functional.layer_norm(next(parts), self.normalized_shape, next(parts), next(parts), self.eps)

    monkeypatch.setattr(FusedLayerNorm, "forward", forward)
    bert, ids = make_bert(), torch.arange(12).view(2, 6)
    with torch.autocast("cpu", torch.bfloat16):
        before = bert(ids).hidden
        use_apex_layer_norm_(bert)
        after = bert(ids).hidden
    assert before.dtype == after.dtype == torch.float32
    assert torch.equal(before, after)


@pytest.mark.parametrize("missing", ["fused_layer_norm_cuda", "apex.normalization"])
def test_half_an_apex_is_none(apex, missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)  # importing it raises ImportError
    assert apex_layer_norm() is None
    assert use_apex_layer_norm_(make_bert()) == 0


def test_pypis_apex_is_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))  # a toolkit for web sites
    assert apex_layer_norm() is None
