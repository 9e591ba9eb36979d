"""The sparse part of the gradient: what adds the entries, and that both ways to do so agree."""

from __future__ import annotations

import pytest
import torch
from attention_cases import HEAD_KINDS, make_case

from megatron_sas.kernels.edges import add_entry_gradients_, entry_adder
from megatron_sas.kernels.reference import valid_heads

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("device", "dtype", "is_our_kernel"),
    [("cuda", torch.float32, True), ("cuda", torch.float64, False), ("cpu", torch.float32, False)],
)
def test_who_adds_entries(device, dtype, is_our_kernel):
    """Our kernel does not take float64, and is for GPUs."""
    from megatron_sas.kernels.triton import entries as triton_entries

    found = entry_adder(torch.device(device), dtype)
    assert (found is triton_entries.add_entry_gradients_) == is_our_kernel


@pytest.mark.parametrize("kind", HEAD_KINDS)
@pytest.mark.parametrize("which", ["both", "head", "dependent"])
def test_sparse_gradient_for_other_kernels(kind, which):
    """The kernel that adds entries on a GPU equals the plain operations that do so elsewhere."""
    from megatron_sas.kernels.triton import entries as triton_entries

    case = make_case(3, batch=2, num_heads=2, seq=130, dim=24, dtype=torch.float64, kind=kind)
    heads = valid_heads(case.heads, None)
    winners = (torch.rand(2, 2, 2, 130, dtype=torch.float64) < 0.3) & (heads >= 0)[None, :, None]
    g_head, g_dependent = torch.randn(2, 2, 2, 130, dtype=torch.float64) * winners
    chosen = (g_head if which != "dependent" else None, g_dependent if which != "head" else None)
    q, k, _ = case.qkv
    exact = [torch.randn(2, 2, 130, 24, dtype=torch.float64) for _ in range(2)]
    found = [x.to(DEVICE, torch.float32) for x in exact]
    triton_entries.add_entry_gradients_(
        *found, q.to(DEVICE, torch.float32), k.to(DEVICE, torch.float32), heads.to(DEVICE), 0.2,
        *(None if g is None else g.to(DEVICE, torch.float32) for g in chosen),
    )  # fmt: skip
    add_entry_gradients_(*exact, q, k, heads, 0.2, *chosen)
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=1e-5, atol=1e-5)
