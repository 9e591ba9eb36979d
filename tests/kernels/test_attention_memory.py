"""What the memory-saving backends allocate, and the substitution in the rows where it could break."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import make_case
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_sas.kernels import attention_statistics, dependency_attention
from megatron_sas.kernels.chunked import ROWS
from megatron_sas.kernels.sdpa import FILLER, substitute


class LargestTensor(TorchDispatchMode):
    """Remembers the memory, in elements, of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def largest(backend: str, dropout_p: float, uneven: bool) -> tuple[int, tuple[int, ...]]:
    case = make_case(0, batch=2, num_heads=3, seq=512, dim=16, dtype=torch.float32, uneven=uneven)
    qkv = [x.float().requires_grad_() for x in case.qkv]
    with LargestTensor() as mode:
        outputs = dependency_attention(*qkv, case.heads, seqlens=case.seqlens, dropout_p=dropout_p, backend=backend)
        sum(o.square().sum() for o in outputs).backward()
    return mode.elements, qkv[0].shape


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize(("backend", "dropout_p"), [("sdpa", 0.0), ("chunked", 0.0), ("chunked", 0.1)])
def test_no_map_is_allocated(backend, dropout_p, uneven):
    elements, (batch, num_heads, seq, dim) = largest(backend, dropout_p, uneven)
    bound = batch * num_heads * seq * (dim if backend == "sdpa" else max(dim, ROWS))
    assert bound <= batch * num_heads * seq * seq / 8
    assert elements <= bound


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("backend", ["sdpa", "chunked"])
def test_statistics_allocate_no_map(backend, uneven):
    case = make_case(0, batch=2, num_heads=3, seq=512, dim=16, dtype=torch.float32, uneven=uneven)
    special = torch.arange(512).expand(2, -1) % 100 == 0
    q, k = (x.float() for x in case.qkv[:2])
    with LargestTensor() as mode:
        attention_statistics(q, k, seqlens=case.seqlens, groups=[special], backend=backend)
    assert mode.elements <= 2 * 3 * 512 * (16 if backend == "sdpa" else ROWS)


def test_the_measure_sees_a_map():
    elements, (batch, num_heads, seq, _) = largest("reference", 0.0, False)
    assert elements >= batch * num_heads * seq * seq


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
