"""Every backend of dependency attention against the float64 reference, and the arguments of the function."""

from __future__ import annotations

import pytest
import torch
from attention_cases import GRADIENT_KINDS, HEAD_KINDS, backward, device_of, make_case
from attention_errors import check_against_float64
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_sas.kernels import dependency_attention

BACKEND_TYPES = [
    *((backend, dtype) for backend in ("sdpa", "chunked") for dtype in (torch.float64, torch.float32, torch.bfloat16)),
    ("chunked", torch.float16),
    ("reference", torch.float32),
]
# An interpreter computes nonsense with bfloat16 (interpreter.py), so only a GPU tests that.
TRITON_DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]
TRITON_TYPES = [("triton", dtype) for dtype in TRITON_DTYPES]
HERE = ["reference", "sdpa", "chunked", "triton"]  # backends that can run on CPU, one in an interpreter (without a GPU)


@settings(max_examples=80, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**31),
    backend_dtype=st.sampled_from(BACKEND_TYPES),
    batch=st.integers(1, 3),
    num_heads=st.integers(1, 4),
    seq=st.one_of(st.integers(1, 20), st.integers(1, 300), st.sampled_from([63, 64, 65, 128])),
    dim=st.sampled_from([8, 16, 24, 32, 40, 64]),
    kind=st.sampled_from(HEAD_KINDS),
    uneven=st.booleans(),
    logit_scale=st.sampled_from([1.0, 1.0, 30.0]),
    gradient_kind=st.sampled_from(GRADIENT_KINDS),
    subset=st.sampled_from([(True, True, True)] * 3 + [(i & 1 > 0, i & 2 > 0, i & 4 > 0) for i in range(1, 8)]),
)
def test_random_cases(seed, backend_dtype, gradient_kind, **shape):
    backend, dtype = backend_dtype
    if dtype == torch.float16 and gradient_kind == "last_layer":
        gradient_kind = "normal"  # such gradients are zero in float16
    shape["subset"] = tuple(shape["subset"])
    if not shape["subset"][0]:
        gradient_kind = "zero"
    check_against_float64(make_case(seed, dtype=dtype, gradient_kind=gradient_kind, **shape), backend)


@settings(max_examples=24, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(TRITON_DTYPES),
    batch=st.integers(1, 2),
    num_heads=st.integers(1, 2),
    seq=st.one_of(st.integers(1, 20), st.integers(1, 260), st.sampled_from([63, 64, 65, 128])),
    dim=st.sampled_from([8, 16, 24, 32, 64, 80, 128]),
    kind=st.sampled_from(HEAD_KINDS),
    uneven=st.booleans(),
    logit_scale=st.sampled_from([1.0, 1.0, 30.0]),
    gradient_kind=st.sampled_from(GRADIENT_KINDS),
    subset=st.sampled_from([(True, True, True)] * 3 + [(i & 1 > 0, i & 2 > 0, i & 4 > 0) for i in range(1, 8)]),
)
def test_random_cases_for_our_kernels(seed, dtype, gradient_kind, subset, **shape):
    if dtype == torch.float16 and gradient_kind == "last_layer":
        gradient_kind = "normal"
    if not subset[0]:
        gradient_kind = "zero"
    case = make_case(seed, dtype=dtype, gradient_kind=gradient_kind, subset=subset, **shape)
    check_against_float64(case, "triton", device_of("triton"))


@pytest.mark.full
def test_a_thousand_tokens_for_our_kernels():
    case = make_case(2, batch=1, num_heads=1, seq=1000, dim=32, dtype=torch.float32, kind="random")
    check_against_float64(case, "triton", device_of("triton"))


@pytest.mark.parametrize(("backend", "dtype"), [*BACKEND_TYPES, *TRITON_TYPES])
@pytest.mark.parametrize("gradient_kind", ["normal", "last_layer"])
def test_every_backend_at_512(backend, dtype, gradient_kind):
    if dtype == torch.float16 and gradient_kind == "last_layer":
        pytest.skip("such gradients are zero in float16")
    device = device_of(backend)
    interpreted = backend == "triton" and device == "cpu"  # slow: three of the largest tiles will do
    shape = {"num_heads": 1, "seq": 384} if interpreted else {"num_heads": 2, "seq": 512}
    case = make_case(0, batch=1, dim=64, dtype=dtype, gradient_kind=gradient_kind, **shape)
    check_against_float64(case, backend, device)


@pytest.mark.parametrize("backend", [name for name in HERE if name != "triton"])
@pytest.mark.parametrize("kind", ["random", "one", "self"])
def test_gradcheck(backend, kind):
    case = make_case(4, batch=2, num_heads=1, seq=5, dim=4, dtype=torch.float64, kind=kind)
    qkv = [x.clone().requires_grad_() for x in case.qkv]
    for seqlens in (None, torch.tensor([5, 3])):

        def function(q, k, v, seqlens=seqlens):
            out, to_head, to_dependent = dependency_attention(q, k, v, case.heads, seqlens=seqlens, backend=backend)
            valid = 5 if seqlens is None else int(seqlens.min())
            return out[:, :, :valid], to_head, to_dependent

        assert torch.autograd.gradcheck(function, qkv)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("kind", ["near", "beyond"])
def test_no_edge_means_zero_without_gradient(backend, kind):
    case = make_case(6, batch=2, num_heads=2, seq=33, dim=8, dtype=torch.float32, kind=kind)
    device = device_of(backend)
    seqlens, heads = torch.tensor([33, 20], device=device), case.heads.to(device)
    qkv = [x.to(device, torch.float32).requires_grad_() for x in case.qkv]
    outputs = dependency_attention(*qkv, heads, seqlens=seqlens, backend=backend)
    positions = torch.arange(33, device=device)
    limit = seqlens[:, None]
    edge = ((heads >= 0) & (heads < limit) & (positions < limit))[:, None, :].expand(-1, 2, -1)
    for probs in outputs[1:]:
        assert (probs[~edge] == 0).all()
        assert (probs[edge] > 0).all()
    assert outputs[1].requires_grad
    gradients = (None, *(torch.where(edge, 0.0, 1.0) for _ in range(2)))
    assert all((g == 0).all() for g in backward(outputs, gradients, qkv))


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        *((name, dtype) for name in HERE if name != "triton" for dtype in (torch.float32, torch.bfloat16)),
        *(("triton", dtype) for dtype in TRITON_DTYPES if dtype != torch.float16),
    ],
)
def test_without_heads_or_without_their_gradient_the_bits_are_the_same(backend, dtype):
    case = make_case(7, batch=2, num_heads=2, seq=65, dim=16, dtype=dtype)
    device = device_of(backend)
    grad_out = case.gradients[0].to(device)
    results = []
    for heads in (None, case.heads, torch.full_like(case.heads, -1)):
        qkv = [x.to(device, dtype).requires_grad_() for x in case.qkv]
        used = None if heads is None else heads.to(device)
        out, to_head, to_dependent = dependency_attention(*qkv, used, backend=backend)
        if heads is None:
            assert to_head is None
            assert to_dependent is None
        results.append((out, *backward((out,), (grad_out,), qkv)))
    assert all(torch.equal(a, b) for a, b in zip(*results[1:], strict=True))
    for a, b in zip(*results[:2], strict=True):
        if device == "cuda":  # two programs, which a compiler may round differently
            torch.testing.assert_close(a, b)
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("backend", HERE)
def test_memory_layout_does_not_matter(backend):
    """Views into one projection, as the model makes them, equal contiguous copies; so do gradients of any layout."""
    torch.manual_seed(8)
    device = device_of(backend)
    joint = torch.randn(2, 40, 3 * 4 * 16).to(device)
    heads = torch.randint(-1, 40, (2, 40)).to(device)
    views = [x.view(2, 40, 4, 16).transpose(1, 2).requires_grad_() for x in joint.split(64, dim=-1)]
    copies = [x.detach().contiguous().requires_grad_() for x in views]
    grad_out = torch.randn(2, 40, 4, 16).to(device).transpose(1, 2)
    gradients = (grad_out, *(torch.randn(2, 40, 4).to(device).transpose(1, 2) for _ in range(2)))
    results = []
    for qkv in (views, copies):
        outputs = dependency_attention(*qkv, heads, backend=backend)
        results.append((*outputs, *backward(outputs, gradients, qkv)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("integer", [torch.int16, torch.int32, torch.int64])
def test_integer_types_of_heads(integer):
    case = make_case(9, batch=1, num_heads=1, seq=9, dim=8, dtype=torch.float32)
    expected = dependency_attention(*case.qkv, case.heads)
    for a, b in zip(expected, dependency_attention(*case.qkv, case.heads.to(integer)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "flash"}, "unknown backend 'flash'"),
        ({"q": torch.zeros(2, 3, 4)}, "must share one shape"),
        ({"k": torch.zeros(1, 2, 5, 8)}, "must share one shape"),
        ({"v": torch.zeros(1, 2, 4, 8, dtype=torch.float64)}, "one floating dtype"),
        ({"heads": torch.zeros(1, 4)}, "heads must be integer"),
        ({"heads": torch.zeros(1, 5, dtype=torch.int64)}, "heads must be integer"),
        ({"seqlens": torch.zeros(2, dtype=torch.int64)}, "seqlens must be integer"),
        ({"dropout_p": 1.0}, "dropout_p must be in"),
        ({"dropout_p": 0.1, "backend": "sdpa"}, "no attention dropout; choose 'auto'"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = {name: torch.zeros(1, 2, 4, 8) for name in "qkv"} | {"heads": torch.zeros(1, 4, dtype=torch.int64)}
    arguments |= change
    positional = [arguments.pop(name) for name in ("q", "k", "v", "heads")]
    with pytest.raises(ValueError, match=message):
        dependency_attention(*positional, **arguments)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_autocast_does_not_round_the_scores(backend):
    case = make_case(10, batch=1, num_heads=2, seq=70, dim=32, dtype=torch.float32)
    qkv = [x.float() for x in case.qkv]
    expected = dependency_attention(*qkv, case.heads, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = dependency_attention(*qkv, case.heads, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
