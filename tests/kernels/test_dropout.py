"""Dropout on attention probabilities in the backends that have it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attention_cases import backward, device_of, make_case
from torch import Tensor

from megatron_sas.kernels import dependency_attention, dropout
from megatron_sas.kernels.dropout import Dropout, draw_kept
from megatron_sas.kernels.reference import attention_probs

WITH_DROPOUT = ["chunked", "reference", "triton"]


def seeded(qkv: list[Tensor], heads: Tensor | None, seed: int, backend: str, dropout_p: float) -> tuple:
    torch.manual_seed(seed)
    return dependency_attention(*qkv, heads, dropout_p=dropout_p, backend=backend)


@pytest.mark.parametrize("backend", WITH_DROPOUT)
def test_equals_explicit_computation_with_the_same_mask(backend):
    """With v = identity the output is the dropped map, which tells the mask; the rest is textbook autograd."""
    # Three blocks of rows; our Triton kernels take no float64 and head dimensions up to 128.
    seq, dtype = (128, torch.float32) if backend == "triton" else (130, torch.float64)
    case = make_case(0, batch=2, num_heads=2, seq=seq, dim=seq, dtype=dtype, kind="random")
    device = device_of(backend)
    heads = case.heads.to(device)
    identity = torch.eye(seq, dtype=dtype, device=device).expand(2, 2, -1, -1)
    dropped, _, _ = seeded([*(x.to(device, dtype) for x in case.qkv[:2]), identity], heads, 7, backend, 0.3)
    mask = (dropped != 0).double().cpu() / 0.7

    qkv = [x.to(device, dtype, copy=True).requires_grad_() for x in case.qkv]
    ours = seeded(qkv, heads, 7, backend, 0.3)
    explicit_qkv = [x.clone().requires_grad_() for x in case.qkv]
    probs = attention_probs(explicit_qkv[0], explicit_qkv[1], None, seq**-0.5)
    rows = torch.arange(seq)
    at_head = torch.stack([probs[b, :, rows, case.heads[b].clamp(min=0)] for b in range(2)])
    at_dependent = torch.stack([probs[b, :, case.heads[b].clamp(min=0), rows] for b in range(2)])
    edge = (case.heads >= 0)[:, None]
    explicit = ((probs * mask) @ explicit_qkv[2], at_head * edge, at_dependent * edge)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-7, "atol": 1e-7}
    for a, b in zip(ours, explicit, strict=True):
        torch.testing.assert_close(a.double().cpu(), b, **close)
    found = backward(ours, tuple(g.to(device) for g in case.gradients), qkv)
    for a, b in zip(found, backward(explicit, case.gradients, explicit_qkv), strict=True):
        torch.testing.assert_close(a.double().cpu(), b, **close)


def test_every_backend_draws_the_same_mask():
    case = make_case(5, batch=2, num_heads=3, seq=70, dim=70, dtype=torch.float32, uneven=True)
    device = device_of("triton")  # of all, because each device has a generator of its own
    q, k = (x.to(device, torch.float32) for x in case.qkv[:2])
    seqlens, identity = case.seqlens.to(device), torch.eye(70, device=device).expand(2, 3, -1, -1)
    kept = []
    for backend in WITH_DROPOUT:
        torch.manual_seed(11)
        out = dependency_attention(q, k, identity, None, seqlens=seqlens, dropout_p=0.25, backend=backend)[0]
        kept.append(out != 0)
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(kept[0], kept[2])


def numpy_mask(seed: int, dropout_p: float, number: int, seq: int) -> np.ndarray:
    """The mask as the module describes it, on numpy's unsigned integers."""

    def mix(x: np.ndarray) -> np.ndarray:
        x = x ^ (x >> np.uint32(16))
        x = x * np.uint32(0x7FEB352D)
        x = x ^ (x >> np.uint32(15))
        x = x * np.uint32(0x846CA68B)
        return x ^ (x >> np.uint32(16))

    low, high = np.array([seed & 0xFFFFFFFF], np.uint32), np.array([seed >> 32], np.uint32)
    keys = []
    for which in (0, 1):
        base = mix(mix(mix(np.array([2 * number + which], np.uint32)) ^ high) ^ low)
        keys.append(mix(base + np.arange(seq, dtype=np.uint32) * np.uint32(0x9E3779B9)) | np.uint32(1))
    return keys[0][:, None] * keys[1][None, :] >= np.uint32(round(dropout_p * 2**32))


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 2**62 - 1, 0x123456789ABCDEF])
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_mask_equals_unsigned_arithmetic(seed, dropout_p):
    found = dropout.keep_mask(torch.tensor([seed]), dropout_p, 2, 3, slice(5, 40), 70)
    for b in range(2):
        for h in range(3):
            assert np.array_equal(found[b, h].numpy(), numpy_mask(seed, dropout_p, b * 3 + h, 70)[5:40])


@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_entries_rows_columns_and_maps_are_uncorrelated(dropout_p):
    """Standard scores of 40 masks of 256 × 256: their means, and the variances of all kinds of correlations."""
    masks = torch.cat([dropout.keep_mask(torch.tensor([seed * 7919]), dropout_p, 2, 4, slice(0, 256), 256).flatten(0, 1)
                       for seed in range(5)])  # fmt: skip
    z = (masks.double() - (1 - dropout_p)) / (dropout_p * (1 - dropout_p)) ** 0.5
    assert abs(float(z.mean())) < 4 / z.numel() ** 0.5
    off = ~torch.eye(256, dtype=torch.bool)
    rows, columns = z @ z.mT / 16, z.mT @ z / 16
    for statistic in (z.sum(1) / 16, z.sum(2) / 16, rows[:, off], columns[:, off]):
        assert float(statistic.var()) == pytest.approx(1, abs=0.05)
        assert float(statistic.abs().max()) < 8
    flat = z.flatten(1)
    between = (flat @ flat.T / 256)[~torch.eye(40, dtype=torch.bool)]
    assert float(between.var()) == pytest.approx(1, abs=0.2)
    square = z[:, 1:, 1:] * z[:, :-1, 1:] * z[:, 1:, :-1] * z[:, :-1, :-1]  # what a hash of two keys might leave
    assert abs(float(square.mean())) < 4 / square.numel() ** 0.5


def test_gradcheck_with_a_fixed_mask():
    case = make_case(1, batch=1, num_heads=2, seq=6, dim=4, dtype=torch.float64, kind="random")
    qkv = [x.clone().requires_grad_() for x in case.qkv]
    assert torch.autograd.gradcheck(lambda *qkv: seeded(qkv, case.heads, 3, "chunked", 0.4), qkv)


@pytest.mark.parametrize("backend", ["chunked", "reference"])  # the others draw the same masks (above)
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
    device = device_of(backend)
    qkv, heads = [x.to(device, torch.float32) for x in case.qkv], case.heads.to(device)
    with_dropout = dependency_attention(*qkv, heads, dropout_p=0.5, backend=backend)
    without = dependency_attention(*qkv, heads, backend=backend)
    for a, b in zip(with_dropout[1:], without[1:], strict=True):
        if device == "cuda":  # two programs, which a compiler may round differently
            torch.testing.assert_close(a, b)
        else:
            assert torch.equal(a, b)
    assert not torch.allclose(with_dropout[0], without[0])


def test_the_generator_decides():
    case = make_case(4, batch=1, num_heads=1, seq=20, dim=8, dtype=torch.float32)
    first = seeded(case.qkv, None, 1, "auto", 0.2)[0]
    assert torch.equal(first, seeded(case.qkv, None, 1, "auto", 0.2)[0])
    assert not torch.equal(first, seeded(case.qkv, None, 2, "auto", 0.2)[0])
    assert not torch.equal(first, dependency_attention(*case.qkv, None, dropout_p=0.2)[0])


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.0005, 0.9996, 25.75 / 256])
def test_numbers_are_kept_independently_with_the_right_probability(dropout_p):
    """In all, where a byte decides, and among neighbours; 0.0005 and 0.9996 are decided by ties alone or nearly."""
    count = 2**22
    kept = draw_kept(count, dropout_p, 3).double()
    deviation = (dropout_p * (1 - dropout_p) / count) ** 0.5
    assert abs(1 - kept.mean() - dropout_p) < 5 * deviation
    centred = kept - (1 - dropout_p)
    for distance in (1, 8, 256):
        product = (centred[distance:] * centred[:-distance]).mean()
        assert abs(product) < 5 * dropout_p * (1 - dropout_p) / count**0.5
    assert torch.equal(kept[:1001], draw_kept(1001, dropout_p, 3).double()) or dropout_p * 256 % 1  # ties come after
    assert not torch.equal(kept, draw_kept(count, dropout_p, 4).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_dropout_scales_what_it_keeps_and_its_gradient(dtype):
    layer, x = Dropout(0.25), torch.ones(128, 300, dtype=dtype, requires_grad=True)
    torch.manual_seed(1)
    output = layer(x)
    output.backward(torch.full_like(output, 3.0))
    kept = output != 0
    assert output.dtype == dtype and abs(kept.double().mean() - 0.75) < 0.01
    assert torch.equal(output[kept], torch.full_like(output[kept], 1 / 0.75))
    assert torch.equal(x.grad, torch.where(kept, output.detach().new_tensor(1 / 0.75) * 3, 0).to(dtype))
    torch.manual_seed(1)
    assert torch.equal(layer(x), output)
    assert not torch.equal(layer(x), output)
    assert torch.equal(layer.eval()(x), x)


def test_hidden_dropout_of_few_numbers_is_torchs():
    x = torch.ones(8, 16)
    torch.manual_seed(2)
    ours = Dropout(0.5)(x)
    torch.manual_seed(2)
    assert torch.equal(ours, torch.nn.Dropout(0.5)(x))
