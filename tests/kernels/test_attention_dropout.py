"""Dropout on attention probabilities in the backends that have it."""

from __future__ import annotations

import pytest
import torch
from attention_cases import backward, make_case
from torch import Tensor

from megatron_sas.kernels import dependency_attention
from megatron_sas.kernels.reference import attention_probs

WITH_DROPOUT = ["chunked", "reference"]


def seeded(qkv: list[Tensor], heads: Tensor | None, seed: int, backend: str, dropout_p: float) -> tuple:
    torch.manual_seed(seed)
    return dependency_attention(*qkv, heads, dropout_p=dropout_p, backend=backend)


@pytest.mark.parametrize("backend", WITH_DROPOUT)
def test_equals_explicit_computation_with_the_same_mask(backend):
    """With v = identity the output is the dropped map, which tells the mask; the rest is textbook autograd."""
    seq = 130  # three blocks of rows
    case = make_case(0, batch=2, num_heads=2, seq=seq, dim=seq, dtype=torch.float64, kind="random")
    identity = torch.eye(seq, dtype=torch.float64).expand(2, 2, -1, -1)
    dropped, _, _ = seeded([*case.qkv[:2], identity], case.heads, 7, backend, 0.3)
    mask = (dropped != 0).double() / 0.7

    qkv = [x.clone().requires_grad_() for x in case.qkv]
    ours = seeded(qkv, case.heads, 7, backend, 0.3)
    explicit_qkv = [x.clone().requires_grad_() for x in case.qkv]
    probs = attention_probs(explicit_qkv[0], explicit_qkv[1], None, seq**-0.5)
    rows = torch.arange(seq)
    at_head = torch.stack([probs[b, :, rows, case.heads[b].clamp(min=0)] for b in range(2)])
    at_dependent = torch.stack([probs[b, :, case.heads[b].clamp(min=0), rows] for b in range(2)])
    edge = (case.heads >= 0)[:, None]
    explicit = ((probs * mask) @ explicit_qkv[2], at_head * edge, at_dependent * edge)
    for a, b in zip(ours, explicit, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(backward(ours, case.gradients, qkv), backward(explicit, case.gradients, explicit_qkv), strict=True):
        torch.testing.assert_close(a, b)


def test_gradcheck_with_a_fixed_mask():
    case = make_case(1, batch=1, num_heads=2, seq=6, dim=4, dtype=torch.float64, kind="random")
    qkv = [x.clone().requires_grad_() for x in case.qkv]
    assert torch.autograd.gradcheck(lambda *qkv: seeded(qkv, case.heads, 3, "chunked", 0.4), qkv)


@pytest.mark.parametrize("backend", WITH_DROPOUT)
@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_fraction_scale_and_mean(backend, dropout_p):
    case = make_case(2, batch=1, num_heads=2, seq=64, dim=64, dtype=torch.float32)
    q, k = (x.float() for x in case.qkv[:2])
    identity = torch.eye(64).expand(1, 2, -1, -1)
    probs = attention_probs(q, k, None, 64**-0.5)
    torch.manual_seed(0)
    draws = torch.stack([dependency_attention(q, k, identity, None, dropout_p=dropout_p, backend=backend)[0]
                         for _ in range(200)])  # fmt: skip
    kept = draws != 0
    count = kept.numel()
    assert float(kept.double().mean()) == pytest.approx(1 - dropout_p, abs=5 * (0.25 / count) ** 0.5)
    torch.testing.assert_close(draws, kept * probs / (1 - dropout_p))
    deviation = (draws.mean(0) - probs) / (probs * (dropout_p / (1 - dropout_p) / 200) ** 0.5)
    assert float(deviation.abs().max()) < 6  # standard errors, the largest of 8192
    assert float(deviation.square().mean()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("backend", WITH_DROPOUT)
def test_probabilities_are_those_before_dropout(backend):
    case = make_case(3, batch=2, num_heads=2, seq=20, dim=8, dtype=torch.float32)
    qkv = [x.float() for x in case.qkv]
    with_dropout = dependency_attention(*qkv, case.heads, dropout_p=0.5, backend=backend)
    without = dependency_attention(*qkv, case.heads, backend=backend)
    assert torch.equal(with_dropout[1], without[1])
    assert torch.equal(with_dropout[2], without[2])
    assert not torch.allclose(with_dropout[0], without[0])


def test_the_generator_decides():
    case = make_case(4, batch=1, num_heads=1, seq=20, dim=8, dtype=torch.float32)
    first = seeded(case.qkv, None, 1, "auto", 0.2)[0]
    assert torch.equal(first, seeded(case.qkv, None, 1, "auto", 0.2)[0])
    assert not torch.equal(first, seeded(case.qkv, None, 2, "auto", 0.2)[0])
    assert not torch.equal(first, dependency_attention(*case.qkv, None, dropout_p=0.2)[0])
