"""Every backend of dependency attention against the float64 reference, and the reference against plain loops."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from attention_cases import GRADIENT_KINDS, HEAD_KINDS, backward, device_of, make_case
from attention_errors import check_against_float64
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import AuxOutput

from megatron_sas.core.cli import InputError
from megatron_sas.kernels import backend_refusal, choose_backend, dependency_attention, edges, lse_attention
from megatron_sas.kernels.sdpa import CudaFlash, CudnnFlash

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
    case = make_case(0, batch=1, num_heads=2, seq=512, dim=64, dtype=dtype, gradient_kind=gradient_kind)
    check_against_float64(case, backend, device_of(backend))


@pytest.mark.parametrize("uneven", [False, True])
def test_flex_attention(uneven, monkeypatch):
    """Forward with torch's own; gradients, which torch has on GPUs only, with plain attention in its place."""
    case = make_case(4, batch=2, num_heads=2, seq=40, dim=16, dtype=torch.float64, kind="random", uneven=uneven)
    exact, exact_grads = case.run("reference", torch.float64)
    valid = case.valid_rows()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # what torch will no longer take
        found = dependency_attention(*case.qkv, case.heads, seqlens=case.seqlens, backend="flex")
    torch.testing.assert_close(found[0] * valid, exact[0] * valid)
    for a, b in zip(found[1:], exact[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # torch returns the logsumexp in float32

    stand_in_for_lse_kernels(monkeypatch, lse_has_gradient=True, mask=None if not uneven else case.valid_keys())
    _, grads = case.run("flex", torch.float64)
    for a, b in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(a, b)


def stand_in_for_lse_kernels(monkeypatch, lse_has_gradient: bool, mask: torch.Tensor | None = None) -> None:
    """Plain attention in place of FlexAttention and FlashAttention-4, on any device; `mask` (B, S) of valid keys."""

    def plain(q, k, v, scale):
        scores = q @ k.mT * scale
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
        lse = scores.logsumexp(-1)
        return scores.softmax(-1) @ v, lse if lse_has_gradient else lse.detach()

    def flex(q, k, v, block_mask, scale, return_aux):
        assert return_aux.lse
        out, lse = plain(q, k, v, scale)
        return out, AuxOutput(lse=lse)

    def flash_attn_func(q, k, v, softmax_scale, return_lse):
        assert return_lse
        out, lse = plain(*(x.transpose(1, 2) for x in (q, k, v)), softmax_scale)
        return out.transpose(1, 2), lse

    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", SimpleNamespace(flash_attn_func=flash_attn_func))
    monkeypatch.setattr(lse_attention, "_flex_function", lambda compiled: flex)
    monkeypatch.setattr(lse_attention, "lse_refusal", lambda *_: None)
    monkeypatch.setattr(sys.modules["megatron_sas.kernels.dependency_attention"], "lse_refusal", lambda *_: None)


LSE_BACKENDS = {"fa4": "install flash-attn-4 4.0.0b5 or later", "flex": "install a torch whose FlexAttention takes"}


@pytest.mark.parametrize("backend", LSE_BACKENDS)
def test_gradient_of_the_regularizer_alone_is_exact_through_a_kernels_logsumexp(backend, monkeypatch):
    """Nothing else in the loss, which could hide that the softmax term is missing: a third of this gradient."""
    case = make_case(11, batch=2, num_heads=2, seq=40, dim=16, dtype=torch.float64, subset=(False, True, True))
    _, exact = case.run("reference", torch.float64)
    stand_in_for_lse_kernels(monkeypatch, lse_has_gradient=True)
    _, found = case.run(backend, torch.float64)
    for a, b in zip(found[:2], exact[:2], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("backend", "remedy"), LSE_BACKENDS.items())
def test_a_logsumexp_without_gradient_is_refused_where_the_regularizer_needs_one(backend, remedy, monkeypatch):
    case = make_case(11, batch=2, num_heads=2, seq=40, dim=16, dtype=torch.float64)
    exact, _ = case.run("reference", torch.float64)
    stand_in_for_lse_kernels(monkeypatch, lse_has_gradient=False)
    with pytest.raises(ValueError, match=f"backend '{backend}': its logsumexp has no gradient, .*{remedy}") as error:
        case.run(backend, torch.float64)
    assert "\n" not in str(error.value)
    with torch.no_grad():  # evaluations need none
        outputs = dependency_attention(*case.qkv, case.heads, backend=backend)
    for a, b in zip(outputs, exact, strict=True):
        torch.testing.assert_close(a, b)
    qkv = [x.clone().requires_grad_() for x in case.qkv]
    assert dependency_attention(*qkv, None, backend=backend)[0].requires_grad  # nor does attention alone


def test_a_run_is_refused_a_kernel_without_gradient_of_its_logsumexp(monkeypatch):
    from megatron_sas.launch.kernel_cache import build_attention_kernels
    from megatron_sas.model.config import BertConfig

    stand_in_for_lse_kernels(monkeypatch, lse_has_gradient=False)
    config = BertConfig(num_heads=2, hidden_size=32, attention_dropout=0.0, attention_backend="fa4")
    with pytest.raises(InputError, match=r"^model.attention_backend: backend 'fa4': its logsumexp has no gradient"):
        build_attention_kernels(config, 1, 16, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_papers_setting(dtype):
    """BERT-base's last layer: 512 tokens, 12 heads of 64, a parsed and an unparsed sequence, gradients of real size."""
    case = make_case(1, batch=2, num_heads=12, seq=512, dim=64, dtype=dtype, gradient_kind="last_layer")
    case.heads[1] = -1
    winners = torch.rand(2, 12, 512) < 1 / 12  # `max` mode: one head per token and direction
    case.gradients = (case.gradients[0], *(g * winners for g in case.gradients[1:]))
    check_against_float64(case, "sdpa")


def test_reference_equals_loops():
    case = make_case(3, batch=2, num_heads=2, seq=7, dim=8, dtype=torch.float64, kind="random")
    seqlens = torch.tensor([7, 5])
    q, k, v = case.qkv
    out, to_head, to_dependent = dependency_attention(q, k, v, case.heads, seqlens=seqlens, backend="reference")
    for b in range(2):
        valid = int(seqlens[b])
        for h in range(2):
            probs = torch.zeros(7, 7, dtype=torch.float64)
            for i in range(7):
                scores = [math.exp(float(q[b, h, i] @ k[b, h, j]) / math.sqrt(8)) for j in range(valid)]
                for j in range(valid):
                    probs[i, j] = scores[j] / sum(scores)
            torch.testing.assert_close(out[b, h], probs @ v[b, h])
            for i in range(7):
                j = int(case.heads[b, i])
                edge = 0 <= j < valid and i < valid
                assert float(to_head[b, h, i]) == pytest.approx(float(probs[i, j]) if edge else 0.0)
                assert float(to_dependent[b, h, i]) == pytest.approx(float(probs[j, i]) if edge else 0.0)


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


def test_chunked_spans_blocks():
    """More rows than one block, not a multiple of it, with edges across blocks."""
    case = make_case(5, batch=2, num_heads=1, seq=150, dim=8, dtype=torch.float64, kind="random", uneven=True)
    check_against_float64(case, "chunked")


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
    case = make_case(7, batch=2, num_heads=3, seq=65, dim=16, dtype=dtype)
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


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_autocast_does_not_round_the_scores(backend):
    case = make_case(10, batch=1, num_heads=2, seq=70, dim=32, dtype=torch.float32)
    qkv = [x.float() for x in case.qkv]
    expected = dependency_attention(*qkv, case.heads, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = dependency_attention(*qkv, case.heads, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_auto_takes_flash_where_it_can():
    q = torch.zeros(1, 1, 4, 8)
    assert choose_backend(q, 0.0) == "sdpa"
    assert choose_backend(q, 0.1) == "chunked"
    assert choose_backend(q.half(), 0.0) == "chunked"


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


def test_a_broken_flash_attention_is_not_there(tmp_path):
    """flash_attn's own import fails, for instance where it was built for another torch."""
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "__init__.py").write_text("raise ImportError('undefined symbol')\n")
    (tmp_path / "flash_attn" / "cute" / "__init__.py").write_text("def flash_attn_func(): pass\n")
    code = f"""
        import sys
        sys.path[:0] = [{str(tmp_path)!r}, {str(Path(__file__).parents[2])!r}]
        import torch
        from megatron_sas.kernels import backend_refusal
        print(backend_refusal("fa4", torch.zeros(1, 1, 4, 8), False, 0.0))
        """
    run = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("FlashAttention-4 cannot be imported"), done.stderr


def test_flash_refuses_float16():
    q = torch.zeros(1, 1, 4, 8, dtype=torch.float16)
    with pytest.raises(ValueError, match="float16"):
        dependency_attention(q, q, q, None, backend="sdpa")


def test_cudnn_refuses_one_token(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    with FakeTensorMode():
        one, two = (torch.empty(2, 3, seq, 64, device="cuda", dtype=torch.bfloat16) for seq in (1, 2))
        assert backend_refusal("cudnn", one, False, 0.1) == "cuDNN's flash kernel takes no sequences of one token"
        assert backend_refusal("cudnn", two, False, 0.1) is None
        assert backend_refusal("sdpa", one, False, 0.1) is None


def test_flex_attention_is_for_training_on_a_gpu():
    """Compiled for every shape, it would soon be no longer compiled at all."""
    with FakeTensorMode():
        q = torch.empty(2, 3, 64, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        assert backend_refusal("flex", q, False, 0.0) is None
        for no_gradients in (torch.no_grad, torch.inference_mode):
            with no_gradients():
                assert backend_refusal("flex", q, False, 0.0).startswith("FlexAttention is compiled for every shape")


@pytest.mark.parametrize(("dtype", "kernels"), [(torch.float32, ["Triton"]), (torch.float64, ["plain", "plain"])])
def test_who_adds_entries_on_a_gpu(dtype, kernels, monkeypatch):
    """Our kernel does not take float64."""
    from megatron_sas.kernels.triton import entries as triton_entries

    used = []
    monkeypatch.setattr(triton_entries, "add_entry_gradients_", lambda *_: used.append("Triton"))
    monkeypatch.setattr(edges, "_add_nonzero_entries_", lambda *_: used.append("plain"))
    with FakeTensorMode():
        q, g = (torch.empty(1, 2, 8, *dims, device="cuda", dtype=dtype) for dims in ((16,), ()))
        edges.add_entry_gradients_(q, q, q, q, torch.empty(1, 8, device="cuda"), 0.2, g, g)
    assert used == kernels


def test_cuda_kernels_take_our_arguments():
    """Shapes only: torch's own declarations of its CUDA kernels, on tensors without data."""
    with FakeTensorMode():
        q = torch.empty(2, 3, 64, 32, device="cuda", dtype=torch.bfloat16)
        for kernel in (CudaFlash, CudnnFlash):
            out, lse, rest = kernel.forward(q, q, q, None, 0.1, 0.2)
            assert out.shape == q.shape
            assert lse.shape == q.shape[:3]
        out, lse, rest = CudaFlash.forward(q, q, q, None, 0.1, 0.2)
        gradients = CudaFlash.backward(torch.empty_like(out), q, q, q, None, out, lse, rest, 0.1, 0.2)
        assert all(g.shape == q.shape for g in gradients)
