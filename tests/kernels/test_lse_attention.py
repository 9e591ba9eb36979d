"""FlexAttention and FlashAttention-4: entries through the gradient of a kernel's logsumexp."""

from __future__ import annotations

import functools
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from attention_cases import make_case, make_heads
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import AuxOutput

from megatron_sas.core.cli import InputError
from megatron_sas.kernels import BACKENDS, dependency_attention, fa4, flex, unsupported_reason
from megatron_sas.kernels.backends import Backend

LSE_BACKENDS = {"fa4": "install flash-attn-4 4.0.0b5 or later", "flex": "install a torch whose FlexAttention takes"}


def put_plain_attention_behind_kernels(monkeypatch, lse_has_gradient: bool) -> None:
    """Plain attention in place of FlexAttention and FlashAttention-4, on any device, for any inputs."""

    def plain(q, k, v, scale, mask=None):
        scores = q @ k.mT * scale
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        lse = scores.logsumexp(-1)
        return scores.softmax(-1) @ v, lse if lse_has_gradient else lse.detach()

    def attend(q, k, v, block_mask, scale, return_aux):
        assert return_aux.lse
        mask = None
        if block_mask is not None:
            sizes = (q.shape[0], 1, q.shape[2], q.shape[2])
            mask = block_mask.mask_mod(*torch.meshgrid(*(torch.arange(n) for n in sizes), indexing="ij"))
        out, lse = plain(q, k, v, scale, mask)
        return out, AuxOutput(lse=lse)

    def flash_attn_func(q, k, v, softmax_scale, return_lse):
        assert return_lse
        out, lse = plain(*(x.transpose(1, 2) for x in (q, k, v)), softmax_scale)
        return out.transpose(1, 2), lse

    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", SimpleNamespace(flash_attn_func=flash_attn_func))
    monkeypatch.setitem(BACKENDS, "flex", Backend(functools.partial(flex.run, attend=attend)))
    monkeypatch.setitem(BACKENDS, "fa4", Backend(fa4.run))


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

    put_plain_attention_behind_kernels(monkeypatch, lse_has_gradient=True)
    _, grads = case.run("flex", torch.float64)
    for a, b in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("seqlens", [None, torch.tensor([40, 23])])
@pytest.mark.parametrize("window", [6, (2, 9)])
def test_flex_attention_has_a_window(seqlens, window, monkeypatch):
    """Forward with torch's own; gradients with plain attention, of scores that would overflow outside of the window."""
    case = make_case(5, batch=2, num_heads=2, seq=40, dim=16, dtype=torch.float64, logit_scale=300.0)
    heads = torch.stack([make_heads(kind, 2, 40) for kind in ("near", "random")], 1)
    options = {"seqlens": seqlens, "window": window}
    valid = torch.ones(2, 1, 40, 1) if seqlens is None else (torch.arange(40) < seqlens[:, None])[:, None, :, None]
    found = dependency_attention(*case.qkv, heads, **options, backend="flex")
    exact = dependency_attention(*case.qkv, heads, **options, backend="reference")
    torch.testing.assert_close(found[0] * valid, exact[0] * valid)
    for a, b in zip(found[1:], exact[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)  # torch returns the logsumexp in float32
        assert torch.equal(a == 0, b == 0)

    put_plain_attention_behind_kernels(monkeypatch, lse_has_gradient=True)
    gradients = []
    for backend in ("flex", "reference"):
        qkv = [x.clone().requires_grad_() for x in case.qkv]
        out, *entries = dependency_attention(*qkv, heads, **options, backend=backend)
        loss = (out * valid).square().sum() + sum(x.square().sum() for x in entries)
        gradients.append(torch.autograd.grad(loss, qkv))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", LSE_BACKENDS)
def test_gradient_of_the_regularizer_alone_is_exact_through_a_kernels_logsumexp(backend, monkeypatch):
    """Nothing else in the loss: a missing softmax term is then most of the gradient."""
    case = make_case(11, batch=2, num_heads=2, seq=40, dim=16, dtype=torch.float64, subset=(False, True, True))
    _, exact = case.run("reference", torch.float64)
    put_plain_attention_behind_kernels(monkeypatch, lse_has_gradient=True)
    _, found = case.run(backend, torch.float64)
    for a, b in zip(found[:2], exact[:2], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("backend", "remedy"), LSE_BACKENDS.items())
def test_a_logsumexp_without_gradient_is_refused_where_the_regularizer_needs_one(backend, remedy, monkeypatch):
    case = make_case(11, batch=2, num_heads=2, seq=40, dim=16, dtype=torch.float64)
    exact, _ = case.run("reference", torch.float64)
    put_plain_attention_behind_kernels(monkeypatch, lse_has_gradient=False)
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

    put_plain_attention_behind_kernels(monkeypatch, lse_has_gradient=False)
    config = BertConfig(num_heads=2, hidden_size=32, attention_dropout=0.0, attention_backend="fa4")
    with pytest.raises(InputError, match=r"^model.attention_backend: backend 'fa4': its logsumexp has no gradient"):
        build_attention_kernels(config, 1, 16, torch.float32, torch.device("cpu"))


def test_a_broken_flash_attention_is_not_there(tmp_path):
    """flash_attn's own import fails, for instance where it was built for another torch."""
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "__init__.py").write_text("raise ImportError('undefined symbol')\n")
    (tmp_path / "flash_attn" / "cute" / "__init__.py").write_text("def flash_attn_func(): pass\n")
    code = f"""
        import sys
        sys.path[:0] = [{str(tmp_path)!r}, {str(Path(__file__).parents[2])!r}]
        import torch
        from megatron_sas.kernels import unsupported_reason
        print(unsupported_reason("fa4", torch.zeros(1, 1, 4, 8), 0.0))
        """
    run = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("FlashAttention-4 cannot be imported"), done.stderr


def test_flex_attention_is_for_training_on_a_gpu():
    """Compiled for every shape, it would soon be no longer compiled at all."""
    with FakeTensorMode():
        q = torch.empty(2, 3, 64, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        assert unsupported_reason("flex", q, 0.0) is None
        for no_gradients in (torch.no_grad, torch.inference_mode):
            with no_gradients():
                assert unsupported_reason("flex", q, 0.0).startswith("FlexAttention is compiled for every shape")
