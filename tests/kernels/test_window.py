"""Local attention: backends that have a window against whole maps in float64, entry by entry."""

from __future__ import annotations

import pytest
import torch
from attention_cases import HEAD_KINDS, backward, by_maps, device_of, make_heads
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_sas.kernels import dependency_attention
from megatron_sas.kernels.reference import attention_probs

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 4e-2}


CASES = {
    "seed": st.integers(0, 2**31),
    "batch": st.integers(1, 2),
    "window": st.one_of(st.integers(0, 40), st.tuples(st.integers(0, 90), st.integers(0, 90))),
    "kinds": st.lists(st.sampled_from(HEAD_KINDS), min_size=1, max_size=3),
    "uneven": st.booleans(),
    "subset": st.sampled_from([(True, True, True), (True, True, False), (False, False, True), (True, False, False)]),
}
PLAIN = {"derandomize": True, "deadline": None, "suppress_health_check": [HealthCheck.too_slow]}


@settings(max_examples=80, **PLAIN)
@given(
    backend=st.sampled_from(["reference", "chunked", "sdpa"]),
    dtype=st.sampled_from(list(TOLERANCE)),
    seq=st.sampled_from([1, 2, 7, 40, 65, 150, 300]),
    **CASES,
)
def test_outputs_and_gradients_equal_those_of_maps(**case):
    check_against_maps(**case)


@settings(max_examples=20, **PLAIN)
@given(seq=st.sampled_from([1, 7, 33, 49, 65]), **CASES)
def test_triton_equals_maps(**case):
    """Its tiles are skipped where the window hides them whole; in the interpreter where there is no GPU."""
    check_against_maps(backend="triton", dtype=torch.float32, **case)


def check_against_maps(seed, backend, dtype, batch, seq, window, kinds, uneven, subset):
    heads = torch.stack([make_heads(kind, batch, seq) for kind in kinds], 1)  # (B, sets, S)
    torch.manual_seed(seed)
    device = device_of(backend)
    exact = [torch.randn(batch, 2, seq, 8).to(dtype).double().requires_grad_() for _ in range(3)]
    lengths = torch.randint(0, seq + 1, (batch,)) if uneven else torch.full((batch,), seq)
    rows = (torch.arange(seq) < lengths[:, None])[:, None, :, None]  # those of out that are specified
    gradients = [torch.randn(batch, 2, seq, 8) * rows, *torch.randn(2, batch, len(kinds), 2, seq)]
    gradients = tuple(g.to(dtype) if wanted else None for g, wanted in zip(gradients, subset, strict=True))
    bounds = window if isinstance(window, tuple) else (window // 2, window // 2)
    expected = by_maps(exact, heads, lengths.tolist(), bounds)
    ours = [x.detach().to(device, dtype).requires_grad_() for x in exact]
    seqlens = lengths.to(device) if uneven else None
    found = dependency_attention(*ours, heads.to(device), seqlens=seqlens, window=window, backend=backend)
    on_device = tuple(None if g is None else g.to(device) for g in gradients)
    of_inputs = [g.cpu() for g in backward(found, on_device, ours)]
    found = tuple(x.cpu() for x in found)
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    assert torch.isfinite(found[0]).all()
    torch.testing.assert_close(found[0].double() * rows, expected[0] * rows, **tolerance)
    for mine, true in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(mine.double(), true, **tolerance)
        assert torch.equal(mine == 0, true == 0)
    for mine, true in zip(of_inputs, backward(expected, gradients, exact), strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=TOLERANCE[dtype], atol=len(kinds) * TOLERANCE[dtype])


@pytest.mark.parametrize("window", [0, 1, 2, 5, 6, 128])
def test_a_number_is_the_local_attention_of_modernbert(window):
    """As transformers makes its mask from the same number."""
    from transformers import ModernBertConfig
    from transformers.masking_utils import sliding_window_bidirectional_mask_function

    theirs = sliding_window_bidirectional_mask_function(ModernBertConfig(local_attention=window).sliding_window)
    places = torch.arange(200)
    q = torch.randn(1, 1, 200, 8)
    out = dependency_attention(q, q, torch.eye(200)[None, None, :, :8].contiguous(), None, window=window)[0]
    seen = attention_probs(q, q, None, 8**-0.5, (window // 2, window // 2)) > 0
    assert torch.equal(seen[0, 0], theirs(0, 0, places[:, None], places[None, :]))
    assert torch.equal(out[0, 0, :, :8] > 0, seen[0, 0, :, :8])


@pytest.mark.parametrize("backend", ["reference", "chunked", "sdpa"])
@pytest.mark.parametrize("seq", [90, 330])
def test_an_edge_outside_of_the_window_has_no_gradient(backend, seq):
    """Nor where its score would overflow."""
    torch.manual_seed(0)
    qkv = [(40 * torch.randn(1, 2, seq, 8)).requires_grad_() for _ in range(3)]
    heads = (torch.arange(seq) + 10).where(torch.arange(seq) < seq - 10, -1)[None]
    out, *entries = dependency_attention(*qkv, heads, window=(4, 9), backend=backend)
    assert all((x == 0).all() for x in entries)
    assert all((g == 0).all() for g in backward((out, *entries), (None, *map(torch.ones_like, entries)), qkv))
    _, to_head, to_dependent = dependency_attention(*qkv, heads, window=(4, 10), backend=backend)
    assert (to_head > 0).any() and (to_dependent == 0).all()


@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_dropout_is_that_of_the_whole_map(backend):
    """The same mask in both, and in both only what it leaves."""
    results, dtype = [], torch.float32 if backend == "triton" else torch.float64
    for name in ("reference", backend):
        torch.manual_seed(1)
        device = device_of(backend)
        qkv = [torch.randn(2, 2, 150, 8, dtype=dtype).to(device).requires_grad_() for _ in range(3)]
        heads = make_heads("near", 2, 150).to(device)
        torch.manual_seed(2)
        outputs = dependency_attention(*qkv, heads, dropout_p=0.3, window=30, backend=name)
        results.append((*outputs, *torch.autograd.grad(sum(x.square().sum() for x in outputs), qkv)))
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if backend == "triton" else {}
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def test_a_window_of_the_whole_sequence_is_none():
    """Every backend has it, and its bits."""
    q = torch.randn(1, 2, 20, 8)
    exact = dependency_attention(q, q, q, None, backend="sdpa")[0]
    for window in (38, (19, 19), (100, 19)):
        assert torch.equal(dependency_attention(q, q, q, None, window=window, backend="sdpa")[0], exact)
    with pytest.raises(ValueError, match=r"^dependency_attention: backend 'cudnn': .* window; choose 'auto'$"):
        dependency_attention(q, q, q, None, window=37, backend="cudnn")


@pytest.mark.parametrize("window", [-1, (-1, 3), (3, -1)])
def test_a_negative_window_is_refused(window):
    q = torch.zeros(1, 1, 4, 8)
    with pytest.raises(ValueError, match="window must be a number or two of at least 0, not"):
        dependency_attention(q, q, q, None, window=window)
