"""The table of backends: what stands in it is all that there is to a backend; what `auto` takes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_sas.core.cli import InputError
from megatron_sas.kernels import BACKENDS, backends, choose_backend, dependency_attention, reference, unsupported_reason
from megatron_sas.kernels.backends import PREFERENCE, Backend
from megatron_sas.launch.kernel_cache import check_attention_backend
from megatron_sas.model.attention import SelfAttention
from megatron_sas.model.config import BertConfig
from megatron_sas.model.modernbert import ModernBertConfig

NO_WINDOW = dict.fromkeys(("sdpa", "cudnn"), "torch's flash kernels for GPUs are used without a window")


def test_a_toy_backend_is_two_functions_and_one_line(monkeypatch):
    """Registered, it trains a model, is refused where it says so, and is left for `auto` in an evaluation."""
    calls = []

    def run(q, k, v, heads, seqlens, dropout_p, scale, window):
        calls.append((dropout_p, scale, window))
        return reference.run(q, k, v, heads, seqlens, dropout_p, scale, window)

    def toy_unsupported_reason(q, dropout_p, has_seqlens, sets, window):
        return "a toy has no seqlens" if has_seqlens else None

    monkeypatch.setitem(BACKENDS, "toy", Backend(run, toy_unsupported_reason))
    q, heads = torch.randn(2, 3, 10, 4), torch.randint(-1, 10, (2, 10))
    found = dependency_attention(q, q, q, heads, window=(1, 2), scale=0.3, backend="toy")
    exact = dependency_attention(q, q, q, heads, window=(1, 2), scale=0.3, backend="reference")
    assert all(torch.equal(a, b) for a, b in zip(found, exact, strict=True))
    assert calls == [(0.0, 0.3, (1, 2))]
    lengths = torch.tensor([10, 4])
    with pytest.raises(ValueError, match=r"^dependency_attention: backend 'toy': a toy has no seqlens; choose 'auto'$"):
        dependency_attention(q, q, q, heads, seqlens=lengths, backend="toy")
    with pytest.raises(ValueError, match=r"unknown backend 'tay'; choose one of auto, .*, toy$"):
        dependency_attention(q, q, q, heads, backend="tay")

    config = BertConfig(hidden_size=12, num_heads=3, attention_dropout=0.0, attention_backend="toy")
    check_attention_backend(config, 10, torch.float32, torch.device("cpu"))
    model, x = SelfAttention(config), torch.randn(2, 10, 12)
    model(x, heads, None)[0].sum().backward()
    assert len(calls) == 2
    model.eval()(x, heads, lengths)  # `auto`
    assert len(calls) == 2
    model(x, heads, None)
    assert len(calls) == 3


def test_a_reason_is_an_error_of_the_configuration(monkeypatch):
    monkeypatch.setitem(BACKENDS, "toy", Backend(reference.run, lambda *_: "is a toy"))
    with pytest.raises(InputError, match=r"^model.attention_backend: toy: is a toy; choose auto$"):
        check_attention_backend(BertConfig(attention_backend="toy"), 10, torch.float32, torch.device("cpu"))


def test_auto_is_the_first_of_the_table_that_can():
    q = torch.zeros(1, 1, 4, 8)
    assert choose_backend(q, 0.0) == "sdpa"
    assert choose_backend(q, 0.1) == "chunked"
    assert choose_backend(q.half(), 0.0) == "chunked"
    assert choose_backend(q, 0.0, sets=2) == "sdpa"
    assert choose_backend(q, 0.0, window=(1, 1)) == "sdpa"
    assert unsupported_reason("auto", q, 0.1) is None
    assert all(set(names) <= set(BACKENDS) for names in PREFERENCE.values())


def test_auto_on_a_gpu_without_triton(monkeypatch):
    monkeypatch.setitem(BACKENDS, "triton", Backend(reference.run, lambda *_: "is not installed"))
    monkeypatch.setitem(BACKENDS, "cudnn", Backend(reference.run, lambda *_: "is not installed"))
    with FakeTensorMode():
        q = torch.empty(2, 3, 64, 64, device="cuda", dtype=torch.bfloat16)
        assert choose_backend(q, 0.1) == "sdpa"
        assert choose_backend(q, 0.1, has_seqlens=True) == "chunked"
        assert choose_backend(q, 0.1, window=(8, 8)) == "chunked"


def test_auto_takes_what_measured_fastest_on_this_architecture(monkeypatch):
    """With and without dropout apart; another architecture keeps the order that nobody measured. Also compiled."""
    compiled = torch.compile(lambda x: x + len(backends._architecture(0)), backend="eager", fullgraph=True)
    assert int(compiled(torch.zeros(()))) == len(backends._architecture(0))
    with FakeTensorMode():
        q = torch.empty(2, 3, 64, 64, device="cuda", dtype=torch.bfloat16)
    default = choose_backend(q, 0.0)
    monkeypatch.setattr(backends, "MEASURED", {"sm_90": {"no_dropout": ["fa4", "sdpa", "chunked"]}})
    assert choose_backend(q, 0.0) == default  # no GPU here, or another
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, index))
    assert choose_backend(q, 0.0) == "sdpa" and choose_backend(q, 0.1) != "sdpa"


def test_a_model_with_windows_is_refused_a_backend_without(monkeypatch):
    """In one line, unless they are as wide as the sequence."""
    monkeypatch.setitem(BACKENDS, "toy", Backend(reference.run, lambda *asked: "has no window" if asked[4] else None))
    config = ModernBertConfig(num_layers=2, local_attention=8, attention_backend="toy")
    with pytest.raises(InputError, match=r"^model.attention_backend: toy: has no window; choose auto$"):
        check_attention_backend(config, 10, torch.float32, torch.device("cpu"))
    check_attention_backend(config, 5, torch.float32, torch.device("cpu"))
    check_attention_backend(replace(config, num_layers=1), 10, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_has_a_window_or_says_in_a_line_why_not(backend):
    with FakeTensorMode():
        q = torch.empty(2, 3, 64, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        reason = unsupported_reason(backend, q, 0.0, window=(8, 8))
    if backend == "fa4":
        assert reason in ("FlashAttention-4 is used without a window",
                          "FlashAttention-4 cannot be imported (PyPI: flash-attn-4)")  # fmt: skip
    else:
        assert reason == NO_WINDOW.get(backend)
