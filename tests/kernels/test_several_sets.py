"""Several sets of edges over one attention: every backend against whole maps in float64, entry by entry."""

from __future__ import annotations

import pytest
import torch
from attention_cases import HEAD_KINDS, backward, by_maps, device_of, make_heads
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_sas.kernels import dependency_attention

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}


@settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**31),
    backend_dtype=st.sampled_from(
        [
            *((name, dtype) for name in ("reference", "chunked", "sdpa") for dtype in TOLERANCE),
            ("triton", torch.float32),
        ]
    ),
    batch=st.integers(1, 2),
    num_heads=st.integers(1, 2),
    seq=st.sampled_from([1, 2, 7, 15, 33, 65]),
    kinds=st.lists(st.sampled_from(HEAD_KINDS), min_size=1, max_size=3),
    uneven=st.booleans(),
    subset=st.sampled_from([(True, True, True), (True, True, False), (False, False, True), (True, False, False)]),
)
def test_outputs_and_gradients_equal_those_of_maps(seed, backend_dtype, batch, num_heads, seq, kinds, uneven, subset):
    backend, dtype = backend_dtype
    device = device_of(backend)
    heads = torch.stack([make_heads(kind, batch, seq) for kind in kinds], 1)  # (B, sets, S)
    torch.manual_seed(seed)
    exact = [torch.randn(batch, num_heads, seq, 8).to(dtype).double().requires_grad_() for _ in range(3)]
    lengths = torch.randint(0, seq + 1, (batch,)) if uneven else torch.full((batch,), seq)
    rows = (torch.arange(seq) < lengths[:, None])[:, None, :, None]  # those of out that are specified
    gradients = [torch.randn(batch, num_heads, seq, 8) * rows]
    gradients += [torch.randn(batch, len(kinds), num_heads, seq) for _ in range(2)]
    gradients = tuple(g.to(dtype) if wanted else None for g, wanted in zip(gradients, subset, strict=True))
    expected = by_maps(exact, heads, lengths.tolist())
    ours = [x.detach().to(device, dtype).requires_grad_() for x in exact]
    seqlens = lengths.to(device) if uneven else None
    found = dependency_attention(*ours, heads.to(device), seqlens=seqlens, backend=backend)
    given = tuple(None if g is None else g.to(device) for g in gradients)
    found_gradients = [g.cpu() for g in backward(found, given, ours)]
    found = [x.cpu() for x in found]
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(found[0].double() * rows, expected[0] * rows, **tolerance)
    for mine, true in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(mine.double(), true, **tolerance)
    for mine, true in zip(found_gradients, backward(expected, gradients, exact), strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=TOLERANCE[dtype], atol=len(kinds) * TOLERANCE[dtype])


@pytest.mark.parametrize("backend", ["reference", "chunked", "sdpa", "triton"])
def test_one_set_of_several_dimensions_is_that_set(backend):
    """Bit for bit, forward and backward."""
    torch.manual_seed(0)
    device = device_of(backend)
    heads, results = make_heads("near", 2, 40).to(device), []
    qkv = [torch.randn(2, 3, 40, 16, device=device, requires_grad=True) for _ in range(3)]
    grad_out, *along = (torch.randn(shape, device=device) for shape in ((2, 3, 40, 16), (2, 3, 40), (2, 3, 40)))
    for edges in (heads, heads[:, None]):
        outputs = dependency_attention(*qkv, edges, backend=backend)
        probabilities = [x if edges.dim() == 2 else x.squeeze(1) for x in outputs[1:]]
        results.append((outputs[0], *probabilities, *backward((outputs[0], *probabilities), (grad_out, *along), qkv)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_dropout_leaves_the_probabilities_of_every_set_alone(backend):
    torch.manual_seed(1)
    device = device_of(backend)
    q, k, v = (torch.randn(2, 2, 70, 8, device=device) for _ in range(3))
    heads = torch.stack([make_heads("near", 2, 70), make_heads("random", 2, 70)], 1).to(device)
    plain = dependency_attention(q, k, v, heads, backend=backend)
    dropped = dependency_attention(q, k, v, heads, dropout_p=0.3, backend=backend)
    assert not torch.equal(plain[0], dropped[0])
    assert torch.equal(plain[1], dropped[1])
    assert torch.equal(plain[2], dropped[2])


def test_gradients_with_dropout_are_those_of_plain_operations():
    """Both draw the same mask; our kernels, which have one set, sum the others' part of δ + t around dropout."""
    results = []
    device = torch.device(device_of("triton"))
    for backend in ("triton", "chunked"):
        torch.manual_seed(4)
        qkv = [torch.randn(2, 2, 70, 16).to(device).requires_grad_() for _ in range(3)]
        heads = torch.stack([make_heads(kind, 2, 70) for kind in ("near", "random", "one")], 1).to(device)
        torch.manual_seed(5)
        out, *entries = dependency_attention(*qkv, heads, dropout_p=0.3, backend=backend)
        loss = out.square().sum() + sum(x.square().sum() for x in entries)
        results.append((out, *entries, *torch.autograd.grad(loss, qkv)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_flex_attention_has_several_sets():
    torch.manual_seed(2)
    q, k, v = (torch.randn(2, 2, 24, 8) for _ in range(3))
    heads = torch.stack([make_heads("near", 2, 24), make_heads("random", 2, 24)], 1)
    with torch.no_grad():
        for mine, true in zip(
            dependency_attention(q, k, v, heads, backend="flex"),
            dependency_attention(q, k, v, heads, backend="reference"),
            strict=True,
        ):
            torch.testing.assert_close(mine, true, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 0, 4), (1, 2, 5), (2, 2, 4), (1, 1, 1, 4)])
def test_sets_of_another_shape_are_refused(shape):
    q = torch.zeros(1, 1, 4, 8)
    with pytest.raises(ValueError, match=r"heads must be integer \(1, 4\) or \(1, sets, 4\)"):
        dependency_attention(q, q, q, torch.zeros(shape, dtype=torch.int64))
