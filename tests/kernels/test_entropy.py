"""Entropy of attention, and attention to groups of tokens, against whole maps in float64."""

from __future__ import annotations

import pytest
import torch
from attention_cases import device_of, make_case

from megatron_sas.kernels import attention_statistics
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
    sizes = {"batch": 3, "num_heads": 2, "seq": seq, "dim": dim, "logit_scale": logit_scale}
    case = make_case(seq, dtype=dtype, uneven=uneven, **sizes)
    q, k, _ = case.qkv
    first, some, none = torch.arange(seq).expand(3, -1) == 0, torch.rand(3, seq) < 0.2, torch.zeros(3, seq) > 0
    groups = [first, some, none]
    probs = attention_probs(q, k, case.seqlens, dim**-0.5, window)
    device = device_of(backend)
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
