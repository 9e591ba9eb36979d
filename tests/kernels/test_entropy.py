"""Entropy of attention, and attention to groups of tokens, against whole maps in float64."""

from __future__ import annotations

import pytest
import torch
from attention_cases import device_of, make_case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_sas.kernels import attention_entropy, attention_statistics
from megatron_sas.kernels.reference import attention_probs

TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-5, torch.bfloat16: 5e-5}
CASES = [
    *((backend, dtype) for backend in ("auto", "sdpa", "chunked") for dtype in (torch.float64, torch.float32)),
    ("auto", torch.bfloat16),  # computed in float32, from the rounded queries and keys
    ("triton", torch.float32),
]


@pytest.mark.parametrize(("backend", "dtype"), CASES)
@pytest.mark.parametrize(("seq", "dim"), [(1, 8), (37, 16), (130, 32)])
@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("logit_scale", [0.0, 1.0, 5.0])
def test_statistics_equal_those_of_the_map(backend, dtype, seq, dim, uneven, logit_scale):
    check_statistics(backend, dtype, seq, dim, uneven, logit_scale, None)


@pytest.mark.parametrize(("backend", "dtype"), CASES)
@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("window", [(4, 4), (0, 40)])
def test_statistics_in_a_window_equal_those_of_the_map(backend, dtype, uneven, window):
    check_statistics(backend, dtype, 150, 16, uneven, 1.0, window)


def check_statistics(backend, dtype, seq, dim, uneven, logit_scale, window):
    device, batch = device_of(backend), 3
    if backend == "triton" and device == "cpu":  # interpreted, and slow: three blocks of rows
        batch, seq = 2, min(seq, 70)
    sizes = {"batch": batch, "num_heads": 2, "seq": seq, "dim": dim, "logit_scale": logit_scale}
    case = make_case(seq, dtype=dtype, uneven=uneven, **sizes)
    q, k, _ = case.qkv
    first = torch.arange(seq).expand(batch, -1) == 0
    some, none = torch.rand(batch, seq) < 0.2, torch.zeros(batch, seq) > 0
    groups = [first, some, none]
    probs = attention_probs(q, k, case.seqlens, dim**-0.5, window)
    seqlens = None if case.seqlens is None else case.seqlens.to(device)
    qk = [x.to(device, dtype) for x in (q, k)]
    on_device = [group.to(device) for group in groups]
    entropy, to_groups = attention_statistics(*qk, seqlens=seqlens, groups=on_device, backend=backend, window=window)
    valid = case.valid_rows()[..., 0]
    exact = [torch.special.entr(probs).sum(-1)]
    exact += [(probs * (group & valid[:, 0])[:, None, None, :]).sum(-1) for group in groups]
    for found, true in zip([entropy, *to_groups], exact, strict=True):
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.isfinite(found).all()
        torch.testing.assert_close(found.cpu().double() * valid, true * valid, rtol=0, atol=TOLERANCE[dtype])


def test_entropy_is_between_that_of_one_token_and_that_of_all():
    """Attention to one token, where rounding could make it negative, and to all alike."""
    q, k = torch.full((1, 1, 9, 4), 40.0), torch.zeros(1, 1, 9, 4)
    k[:, :, 3] = 40.0
    entropy, (to_third,) = attention_statistics(q, k, groups=[torch.arange(9)[None] == 3])
    assert (entropy == 0.0).all()
    assert (to_third == 1.0).all()
    entropy, _ = attention_statistics(q, torch.zeros_like(k))
    torch.testing.assert_close(entropy, torch.full_like(entropy, 9).log())


def test_a_backend_without_logsumexp_is_refused():
    q = torch.zeros(1, 1, 4, 8)
    with pytest.raises(ValueError, match="backend 'reference' returns no logsumexp here; choose 'auto'"):
        attention_statistics(q, q, backend="reference")


GRADIENT_TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}


def entropy_of_maps(q, k, seqlens, window) -> torch.Tensor:
    """Σ -α log α of every row of whole maps; no gradient comes from keys that a row does not see."""
    probs = attention_probs(q, k, seqlens, q.shape[-1] ** -0.5, window)
    return torch.where(probs > 0, -probs * torch.where(probs > 0, probs, 1.0).log(), 0.0).sum(-1)


@settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**31),
    backend=st.sampled_from(["auto", "sdpa", "chunked"]),
    dtype=st.sampled_from(list(GRADIENT_TOLERANCE)),
    batch=st.integers(1, 2),
    seq=st.sampled_from([1, 2, 7, 40, 65, 150]),
    window=st.one_of(st.none(), st.integers(0, 40), st.tuples(st.integers(0, 90), st.integers(0, 90))),
    uneven=st.booleans(),
    logit_scale=st.sampled_from([0.0, 0.3, 1.0, 3.0]),
)
def test_entropy_and_its_gradient_equal_those_of_maps(seed, backend, dtype, batch, seq, window, uneven, logit_scale):
    """Rows beyond a sequence's length have no gradient, as their entropy is not specified."""
    torch.manual_seed(seed)
    exact = [(torch.randn(batch, 2, seq, 8) * logit_scale).to(dtype).double().requires_grad_() for _ in range(2)]
    lengths = torch.randint(0, seq + 1, (batch,)) if uneven else None
    limit = torch.full((batch,), seq) if lengths is None else lengths
    rows = (torch.arange(seq) < limit[:, None])[:, None]
    bounds = (window // 2, window // 2) if isinstance(window, int) else window
    expected = entropy_of_maps(*exact, lengths, bounds)
    ours = [x.detach().to(dtype).requires_grad_() for x in exact]
    found = attention_entropy(*ours, seqlens=lengths, window=window, backend=backend)
    assert found.dtype == dtype
    assert torch.isfinite(found).all()
    # H is a difference of numbers as large as the scores.
    allowed = GRADIENT_TOLERANCE[dtype] * max(1.0, 3 * logit_scale**2)
    tolerance = {"rtol": allowed, "atol": allowed}
    torch.testing.assert_close(found.double() * rows, expected * rows, **tolerance)
    weights = torch.randn(batch, 2, seq, dtype=torch.float64) * rows  # of either sign, as λ
    theirs = torch.autograd.grad(expected, exact, weights)
    mine = torch.autograd.grad(found, ours, weights.to(dtype))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one.double(), other, **tolerance)
    groups = [torch.rand(batch, seq) < 0.3]
    statistics, to_groups = attention_statistics(*ours, seqlens=lengths, groups=groups, window=window, backend=backend)
    torch.testing.assert_close(statistics.double() * rows, expected.detach() * rows, **tolerance)
    probs = attention_probs(*exact, lengths, 8**-0.5, bounds).detach()
    inside = (groups[0] & rows[:, 0])[:, None, None]
    torch.testing.assert_close(to_groups[0].double() * rows, (probs * inside).sum(-1) * rows, **tolerance)


@pytest.mark.parametrize("backend", ["auto", "chunked"])
def test_gradient_in_bfloat16_is_off_by_rounding(backend):
    """Against float64 from the same rounded queries and keys."""
    torch.manual_seed(0)
    exact = [torch.randn(2, 4, 96, 32).bfloat16().double().requires_grad_() for _ in range(2)]
    ours = [x.detach().bfloat16().requires_grad_() for x in exact]
    found, expected = attention_entropy(*ours, backend=backend), entropy_of_maps(*exact, None, None)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 0.01
    weights = torch.randn(2, 4, 96, dtype=torch.float64)
    theirs = torch.autograd.grad(expected, exact, weights)
    mine = torch.autograd.grad(found, ours, weights.float())
    for one, other in zip(mine, theirs, strict=True):
        assert (one.double() - other).norm() < 0.01 * other.norm()


def test_triton_has_the_gradient_too():
    device = device_of("triton")
    torch.manual_seed(0)
    exact = [torch.randn(2, 2, 37, 16).float().double().requires_grad_() for _ in range(2)]
    lengths = torch.tensor([37, 20])
    rows = (torch.arange(37) < lengths[:, None])[:, None]
    weights = torch.randn(2, 2, 37, dtype=torch.float64) * rows
    ours = [x.detach().float().to(device).requires_grad_() for x in exact]
    found = attention_entropy(*ours, seqlens=lengths.to(device), backend="triton")
    theirs = torch.autograd.grad(entropy_of_maps(*exact, lengths, None), exact, weights)
    for one, other in zip(torch.autograd.grad(found, ours, weights.float().to(device)), theirs, strict=True):
        torch.testing.assert_close(one.cpu().double(), other, rtol=2e-5, atol=2e-5)


def test_a_window_is_refused_by_a_backend_that_has_none():
    q = torch.zeros(1, 1, 9, 8)
    with pytest.raises(ValueError, match="backend 'cudnn': torch's flash kernels for GPUs are used without a window"):
        attention_entropy(q, q, window=2, backend="cudnn")
