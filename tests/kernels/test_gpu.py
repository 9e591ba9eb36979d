"""The same checks on a GPU, with the kernels that exist only there; skipped where there is none."""

from __future__ import annotations

import pytest
import torch
from attention_cases import GRADIENT_KINDS, HEAD_KINDS, backward, make_case, make_heads
from attention_errors import check_against_float64

from megatron_sas.kernels import backends, choose_backend, dependency_attention, dropout
from megatron_sas.kernels.fa4 import has_fa4
from megatron_sas.kernels.reference import attention_probs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

HALVES = (torch.bfloat16, torch.float16)
TYPES = [
    *(("triton", dtype) for dtype in (torch.float32, *HALVES)),
    ("sdpa", torch.bfloat16),
    ("cudnn", torch.bfloat16),
    *(("flex", dtype) for dtype in (torch.float32, *HALVES)),
    *(("fa4", dtype) for dtype in HALVES if has_fa4()),
]
NO_LENGTHS = ("sdpa", "cudnn", "fa4")
SHAPES = [(1, 64), (17, 64), (64, 64), (200, 64), (512, 64), (1000, 64), (200, 32), (512, 32), (200, 128), (512, 128)]
"""S and D; each D and each kind of S costs the compilation of all kernels in every dtype."""


@pytest.fixture(autouse=True)
def _compiled_anew():
    """After eight shapes FlexAttention would no longer be compiled, and something else be tested."""
    torch._dynamo.reset()


@pytest.mark.parametrize(("backend", "dtype"), TYPES)
@pytest.mark.parametrize(("seq", "dim"), SHAPES)
def test_against_float64(backend, dtype, seq, dim):
    if backend == "flex" and (seq, dim) != (200, 64):
        pytest.skip("compiles anew for every shape")
    if backend == "cudnn" and seq == 1:
        pytest.skip("cuDNN refuses one token")
    for seed in range(6):
        size = "normal" if dtype == torch.float16 else GRADIENT_KINDS[seed % 2]  # smaller ones are zero in float16
        case = make_case(
            seed, batch=2, num_heads=3, seq=seq, dim=dim, dtype=dtype, kind=HEAD_KINDS[seed], gradient_kind=size,
            uneven=backend not in NO_LENGTHS and seed % 3 == 0, logit_scale=30.0 if seed == 5 else 1.0,
        )  # fmt: skip
        check_against_float64(case, backend, "cuda")


@pytest.mark.parametrize(("backend", "dtype"), TYPES)
def test_the_papers_setting(backend, dtype):
    """BERT-base's last layer, a parsed and an unparsed sequence, one winner in 144 maps, gradients of real size."""
    kind = "normal" if dtype == torch.float16 else "last_layer"
    case = make_case(1, batch=2, num_heads=12, seq=512, dim=64, dtype=dtype, gradient_kind=kind)
    case.heads[1] = -1
    winners = torch.rand(2, 12, 512) < 1 / 144
    case.gradients = (case.gradients[0], *(g * winners for g in case.gradients[1:]))
    check_against_float64(case, backend, "cuda")


@pytest.mark.parametrize(("backend", "dtype"), [*TYPES, *(("chunked", dtype) for dtype in (torch.float32, *HALVES))])
@pytest.mark.parametrize("subset", [(False, True, True), (False, True, False), (False, False, True)])
def test_gradient_of_the_regularizer_alone(backend, dtype, subset):
    """Loss = R: a kernel whose logsumexp has no gradient lacks a third of it, which a larger loss would hide."""
    case = make_case(
        7, batch=2, num_heads=3, seq=200, dim=64, dtype=dtype, kind="random", gradient_kind="zero", subset=subset
    )
    check_against_float64(case, backend, "cuda")
    _, exact = case.run("reference", torch.float64)
    _, found = case.run(backend, dtype, "cuda")
    for a, b in zip(found[:2], exact[:2], strict=True):
        assert float((a.double() - b).norm() / b.norm()) < 0.02


@pytest.mark.parametrize(("backend", "dtype"), TYPES)
def test_several_sets_of_edges(backend, dtype):
    case = make_case(9, batch=2, num_heads=3, seq=200, dim=64, dtype=dtype)
    case.heads = torch.stack([make_heads(kind, 2, 200) for kind in ("near", "random", "one")], 1)
    case.gradients = (case.gradients[0], *torch.randn(2, 2, 3, 3, 200).double())
    exact, found = case.run("reference", torch.float64), case.run(backend, dtype, "cuda")
    for a, b in zip((*found[0], *found[1]), (*exact[0], *exact[1]), strict=True):
        assert float((a.double() - b).detach().norm() / b.detach().norm()) < (1e-4 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_plain_operations(dtype):
    """What `auto` takes where no kernel can; entries are added by a kernel of ours, but to float64."""
    case = make_case(8, batch=2, num_heads=3, seq=150, dim=40, dtype=dtype, kind="random", uneven=True)
    check_against_float64(case, "chunked", "cuda")


@pytest.mark.parametrize("backend", ["triton", "sdpa", "cudnn"])
def test_dropout_equals_explicit_computation_with_the_same_mask(backend):
    """With v = identity the output is the dropped map, which tells the mask; the rest is textbook autograd."""
    seq, keep = 128, 0.9
    case = make_case(0, batch=2, num_heads=2, seq=seq, dim=seq, dtype=torch.bfloat16, kind="random")
    qkv = [x.to("cuda", torch.bfloat16) for x in case.qkv]
    heads = case.heads.to("cuda")
    identity = torch.eye(seq, device="cuda", dtype=torch.bfloat16).expand(2, 2, -1, -1).contiguous()
    torch.manual_seed(7)
    mask = dependency_attention(*qkv[:2], identity, heads, dropout_p=0.1, backend=backend)[0] != 0
    assert 0.85 < float(mask.float().mean()) < 0.95

    inputs = [x.clone().requires_grad_() for x in qkv]
    torch.manual_seed(7)
    ours = dependency_attention(*inputs, heads, dropout_p=0.1, backend=backend)
    exact_inputs = [x.double().requires_grad_() for x in qkv]
    probs = attention_probs(exact_inputs[0], exact_inputs[1], None, seq**-0.5)
    index = heads.clamp(min=0)[:, None, :, None].expand(-1, 2, -1, 1)
    edge = (heads >= 0)[:, None]
    exact = (
        (probs * mask / keep) @ exact_inputs[2],
        probs.gather(-1, index).squeeze(-1) * edge,
        probs.mT.gather(-1, index).squeeze(-1) * edge,
    )
    gradients = tuple(g.to("cuda") for g in case.gradients)
    pairs = [*zip(ours, exact, strict=True)]
    pairs += zip(backward(ours, gradients, inputs), backward(exact, gradients, exact_inputs), strict=True)
    for a, b in pairs:
        assert float((a.double() - b).norm() / b.norm()) < 0.01


@pytest.mark.parametrize(("backend", "device"), [("triton", "cuda"), ("chunked", "cuda"), ("reference", "cpu")])
def test_dropout_masks_are_the_same_on_every_device(backend, device):
    q, k, identity = (x.expand(1, 2, -1, -1).to(device) for x in (*torch.randn(2, 64, 64), torch.eye(64)))
    torch.manual_seed(3)
    seed = dropout.draw_seed(torch.device(device))
    torch.manual_seed(3)
    out = dependency_attention(q, k, identity, None, dropout_p=0.1, backend=backend)[0]
    assert torch.equal((out != 0).cpu(), dropout.keep_mask(seed.cpu(), 0.1, 1, 2, slice(0, 64), 64))


def test_searched_and_fixed_tiles_agree():
    from megatron_sas.kernels.triton.attention import _SEARCHED

    case = make_case(2, batch=16, num_heads=8, seq=512, dim=64, dtype=torch.bfloat16)
    fast = case.run("triton", torch.bfloat16, "cuda")
    assert all(search.cache for search in _SEARCHED["half"].values())  # so many tokens are searched for
    torch.use_deterministic_algorithms(True)
    try:
        fixed = case.run("triton", torch.bfloat16, "cuda")
        again = case.run("triton", torch.bfloat16, "cuda")
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b, c in zip((*fast[0], *fast[1]), (*fixed[0], *fixed[1]), (*again[0], *again[1]), strict=True):
        assert torch.equal(b, c)
        assert float((a.double() - b.double()).norm() / b.double().norm()) < 0.01


def test_auto_takes_our_kernels(monkeypatch):
    monkeypatch.setattr(backends, "MEASURED", {})
    q = torch.zeros(1, 2, 64, 64, device="cuda", dtype=torch.bfloat16)
    assert choose_backend(q, 0.1) == "triton"
    assert choose_backend(q.double(), 0.1) == "chunked"
    assert choose_backend(torch.zeros(1, 1, 64, 256, device="cuda", dtype=torch.bfloat16), 0.0) in ("sdpa", "cudnn")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("backend", ["triton", "sdpa", "cudnn"])
def test_on_another_gpu_than_the_current_one(backend):
    case = make_case(2, batch=2, num_heads=3, seq=200, dim=64, dtype=torch.bfloat16)
    check_against_float64(case, backend, "cuda:1")
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("backend", ["triton", "sdpa"])
def test_more_maps_than_a_second_grid_axis_takes(backend):
    """70,000 maps: "sdpa" adds entries with a kernel of ours. The last maps equal those computed alone."""
    batch, num_heads, seq, last = 17_500, 4, 8, 2
    if backend == "sdpa":  # FlashAttention-2 has the heads on a grid axis of their own
        batch, num_heads = 35_000, 2
    torch.manual_seed(4)
    joint = torch.randn(3, batch, num_heads, seq, 16, device="cuda").to(torch.bfloat16)
    heads = torch.randint(-1, seq, (batch, seq), device="cuda")
    results = []
    for part in (slice(None), slice(batch - last, None)):
        qkv = [x.clone().requires_grad_() for x in joint[:, part]]
        outputs = dependency_attention(*qkv, heads[part], backend=backend)
        results.append((*outputs, *torch.autograd.grad(sum(x.float().square().sum() for x in outputs), qkv)))
    for all_maps, few in zip(*results, strict=True):
        assert torch.isfinite(all_maps).all()
        torch.testing.assert_close(all_maps[-last:], few)
    torch.manual_seed(5)
    seed = dropout.draw_seed(torch.device("cuda"))
    torch.manual_seed(5)
    if backend == "triton":
        identity = torch.eye(seq, 16, device="cuda", dtype=torch.bfloat16).expand_as(joint[0])
        out = dependency_attention(joint[0], joint[1], identity, None, dropout_p=0.3, backend=backend)[0]
        expected = dropout.keep_mask(seed, 0.3, batch, num_heads, slice(0, seq), seq)
        assert torch.equal(out[..., :seq] != 0, expected)


@pytest.mark.parametrize("backend", ["triton", "sdpa", "cudnn"])
def test_nothing_waits_for_the_gpu(backend):
    """Forward and backward of the `max` regularizer's shape, after a warm-up."""
    case = make_case(3, batch=2, num_heads=4, seq=256, dim=64, dtype=torch.bfloat16)
    qkv = [x.to("cuda", torch.bfloat16).requires_grad_() for x in case.qkv]
    heads, gradients = case.heads.to("cuda"), tuple(g.to("cuda") for g in case.gradients)

    def step():
        outputs = dependency_attention(*qkv, heads, dropout_p=0.1, backend=backend)
        return backward(outputs, gradients, qkv)

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", ["triton", "sdpa", "cudnn"])
def test_memory_is_linear_in_the_sequence(backend):
    peaks = []
    for seq in (1024, 4096):
        q = torch.randn(1, 4, seq, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        heads = torch.arange(seq, device="cuda").roll(1)[None]
        for _ in range(2):  # the first run may search for tile sizes
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            outputs = dependency_attention(q, q, q, heads, backend=backend)
            sum(x.float().sum() for x in outputs).backward()
            peak = torch.cuda.max_memory_allocated() - before
        peaks.append(peak)
    assert peaks[1] < 5 * peaks[0]
