"""What is particular to torch's own flash kernels: the substituted output, and the kernels' arguments and limits."""

from __future__ import annotations

import pytest
import torch
from attention_cases import make_case
from attention_errors import check_against_float64
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_sas.kernels import dependency_attention, unsupported_reason
from megatron_sas.kernels.sdpa import FILLER, CudaFlash, CudnnFlash, substitute


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_papers_setting(dtype):
    """BERT-base's last layer: 512 tokens, 12 heads of 64, a parsed and an unparsed sequence, gradients of real size."""
    case = make_case(1, batch=2, num_heads=12, seq=512, dim=64, dtype=dtype, gradient_kind="last_layer")
    case.heads[1] = -1
    winners = torch.rand(2, 12, 512) < 1 / 12  # `max` mode: one head per token and direction
    case.gradients = (case.gradients[0], *(g * winners for g in case.gradients[1:]))
    check_against_float64(case, "sdpa")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_substitution_gives_the_wanted_product(dtype):
    """dO·O' = δ + t for every size of dO, also where a filler meets its own negative or squares underflow."""
    torch.manual_seed(0)
    filler = FILLER[dtype]
    rows = [torch.randn(16).double() * 10.0**size for size in range(-30, 4)]
    almost = torch.zeros(16, dtype=torch.float64)
    almost[0] = -filler * (1 - torch.finfo(dtype).eps)
    rows += [torch.zeros(16, dtype=torch.float64), almost, -almost]
    grad_out = torch.stack(rows).to(dtype)[None, None]
    out = torch.randn(grad_out.shape).to(dtype)
    row_sum = torch.randn(grad_out.shape[:3]).to(torch.float64 if dtype == torch.float64 else torch.float32)
    new_grad, new_out = (x.double() for x in substitute(grad_out, out, row_sum))
    assert torch.isfinite(new_out).all()
    assert ((new_grad - grad_out).abs() <= 2 * filler).all()
    product, wanted = (new_grad * new_out).sum(-1), (new_grad * out.double()).sum(-1) + row_sum
    size = (new_grad * new_out).abs().sum(-1) + (new_grad * out.double()).abs().sum(-1)
    assert ((product - wanted).abs() <= 2 * torch.finfo(dtype).eps * size).all()


def test_substitution_leaves_rows_without_entries_alone():
    grad_out, out = torch.randn(1, 1, 3, 8), torch.randn(1, 1, 3, 8)
    grad_out[0, 0, 0] = 0
    new_grad, new_out = substitute(grad_out, out, torch.tensor([[[0.0, 0.0, 1.0]]]))
    assert torch.equal(new_grad[0, 0, :2], grad_out[0, 0, :2])
    assert torch.equal(new_out[0, 0, :2], out[0, 0, :2])
    assert not torch.equal(new_out[0, 0, 2], out[0, 0, 2])


def test_flash_refuses_float16():
    q = torch.zeros(1, 1, 4, 8, dtype=torch.float16)
    with pytest.raises(ValueError, match="float16"):
        dependency_attention(q, q, q, None, backend="sdpa")


def test_cudnn_refuses_one_token():
    without = None if torch.backends.cudnn.is_available() else "this build of torch has no cuDNN"
    with FakeTensorMode():
        one, two = (torch.empty(2, 3, seq, 64, device="cuda", dtype=torch.bfloat16) for seq in (1, 2))
        assert unsupported_reason("cudnn", one, 0.1) == "cuDNN's flash kernel takes no sequences of one token"
        assert unsupported_reason("cudnn", two, 0.1) == without
        assert unsupported_reason("sdpa", one, 0.1) is None


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
