"""What the memory-saving backends allocate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import make_case
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_sas.kernels import attention_entropy, attention_statistics, dependency_attention
from megatron_sas.kernels.chunked import ROWS


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


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("backend", ["sdpa", "chunked"])
def test_entropy_and_its_gradient_allocate_no_map(backend, uneven):
    case = make_case(0, batch=2, num_heads=3, seq=512, dim=16, dtype=torch.float32, uneven=uneven)
    q, k = (x.float().requires_grad_() for x in case.qkv[:2])
    with LargestTensor() as mode:
        attention_entropy(q, k, seqlens=case.seqlens, backend=backend).sum().backward()
    assert mode.elements <= 2 * 3 * 512 * (16 if backend == "sdpa" else ROWS)


def test_the_measure_sees_a_map():
    elements, (batch, num_heads, seq, _) = largest("reference", 0.0, False)
    assert elements >= batch * num_heads * seq * seq
