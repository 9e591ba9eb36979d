"""The product behind every linear layer, against torch's own in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_sas.kernels import cpu_linear as linear_module
from megatron_sas.kernels.cpu_linear import Linear, library_in_use, linear, measure_library, use_library

needs_onednn = pytest.mark.skipif(not linear_module._has_onednn(), reason="needs a torch with oneDNN")
Inputs = tuple[Tensor, Tensor, Tensor | None, Tensor]


@pytest.fixture(autouse=True)
def onednn():
    """It multiplies in these tests, whatever the processor."""
    use_library("onednn")
    yield
    use_library(None)


@needs_onednn
def test_the_library_is_the_chosen_one_and_follows_the_processor_where_none_was(monkeypatch):
    for library in ("torch", "onednn"):
        use_library(library)
        assert library_in_use() == library
    use_library(None)
    for capability, library in (("AVX2", "torch"), ("AVX512", "onednn")):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        assert library_in_use() == library


@needs_onednn
def test_measurement_chooses_what_is_much_faster(monkeypatch):
    slow = torch.randn(700, 700)

    def slowed(product):
        return lambda *arguments: (slow @ slow, product(*arguments))[1]

    for name, place, library in (("linear", F, "onednn"), ("_product", linear_module, "torch")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, slowed(getattr(place, name)))
            assert measure_library() == library


def inputs(shape: tuple[int, ...], out: int, bias: bool = True) -> Inputs:
    """x, weight, bias and the output's gradient in float64."""
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    weight = torch.randn(out, shape[-1], dtype=torch.float64)
    bias_ = torch.randn(out, dtype=torch.float64) if bias else None
    return x, weight, bias_, torch.randn(*shape[:-1], out, dtype=torch.float64)


def results(function, tensors: Inputs, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients."""
    *leaves, grad = [None if tensor is None else tensor.to(dtype) for tensor in tensors]
    leaves = [None if leaf is None else leaf.detach().requires_grad_() for leaf in leaves]
    output = function(*leaves)
    output.backward(grad)
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]


@pytest.mark.parametrize(
    ("shape", "out"), [((1, 1), 1), ((7, 13), 5), ((3, 1), 9), ((1, 300), 1), ((2, 65, 129), 33), ((4, 512, 256), 768)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients(shape: tuple[int, ...], out: int, bias: bool) -> None:
    tensors = inputs(shape, out, bias)
    expected = results(F.linear, tensors, torch.float64)
    for tensor, exact in zip(results(linear, tensors, torch.float32), expected, strict=True):
        assert tensor.shape == exact.shape
        assert tensor.is_contiguous()
        assert (tensor - exact).abs().max() <= 3e-6 * exact.abs().max()


@needs_onednn
def test_strides_of_any_kind() -> None:
    x, weight, bias, grad = inputs((6, 10, 24), 8)
    x, grad = x.transpose(0, 1), grad.transpose(0, 1)
    weight = weight.t().contiguous().t()
    expected = results(F.linear, (x, weight, bias, grad), torch.float64)
    for tensor, exact in zip(results(linear, (x, weight, bias, grad), torch.float32), expected, strict=True):
        torch.testing.assert_close(tensor.double(), exact, rtol=1e-5, atol=1e-5)
    expanded = results(linear, (x, weight, bias, torch.ones(1, dtype=torch.float64).expand(10, 6, 8)), torch.float32)
    torch.testing.assert_close(expanded[3].double(), torch.full((8,), 60.0, dtype=torch.float64))


@needs_onednn
def test_gradients_only_where_needed() -> None:
    x, weight = torch.randn(3, 4), torch.randn(5, 4, requires_grad=True)
    output = linear(x, weight)
    assert type(output.grad_fn).__name__ == "_OneDnnLinearBackward"
    output.sum().backward()
    assert x.grad is None
    torch.testing.assert_close(weight.grad, x.sum(0).expand(5, 4))
    with torch.no_grad():
        assert not linear(x, weight).requires_grad


@needs_onednn
def test_infinite_bias_and_poisoned_inputs() -> None:
    x, weight, bias = torch.randn(3, 4), torch.randn(6, 4), torch.randn(6)
    bias[4:] = -torch.inf
    assert torch.equal(torch.isneginf(linear(x, weight, bias)), torch.isneginf(F.linear(x, weight, bias)))
    x[1, 2] = torch.nan
    assert torch.equal(linear(x, weight, bias).isnan(), F.linear(x, weight, bias).isnan())


def reason_for_torchs_own(case: str) -> Tensor:
    """The output of `linear` on inputs that are not for oneDNN."""
    x, weight = torch.randn(3, 4), torch.randn(5, 4, requires_grad=True)
    if case == "float64":
        return linear(x.double(), weight.double())
    if case == "bfloat16":
        return linear(x.bfloat16(), weight.bfloat16())
    if case == "empty":
        return linear(x[:0], weight)
    if case == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return linear(x, weight)
    with torch.backends.mkldnn.flags(enabled=False):
        return linear(x, weight)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@pytest.mark.parametrize("case", ["float64", "bfloat16", "empty", "autocast", "switched off"])
def test_everything_else_is_torchs(case: str) -> None:
    output = reason_for_torchs_own(case)
    assert type(output.grad_fn).__name__ != "_OneDnnLinearBackward"
    assert output.dtype == {"float64": torch.float64, "bfloat16": torch.bfloat16, "autocast": torch.bfloat16}.get(
        case, torch.float32
    )


@needs_onednn
def test_compiled_code_has_torchs_own() -> None:
    layer = Linear(4, 5)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    x = torch.randn(3, 4)
    torch.testing.assert_close(torch.compile(layer, backend=backend, fullgraph=True)(x), layer(x))
    assert len(graphs) == 1
