"""The self-attention module: its projections, and that it passes on what dependency attention is told."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from bert_pairs import SMALL

from megatron_sas.kernels.reference import attention_probs
from megatron_sas.model.attention import SelfAttention


def make(**changes) -> tuple[SelfAttention, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return SelfAttention(replace(SMALL, **changes)), torch.randn(2, 10, 48), torch.randint(-1, 10, (2, 10))


def by_hand(module: SelfAttention, x: torch.Tensor) -> torch.Tensor:
    """Textbook multi-head attention, one head at a time."""
    query, key, value = module.qkv(x).chunk(3, dim=-1)
    parts = []
    for h in range(4):
        columns = slice(12 * h, 12 * (h + 1))
        scores = query[..., columns] @ key[..., columns].transpose(1, 2) / 12**0.5
        parts.append(scores.softmax(-1) @ value[..., columns])
    return F.linear(torch.cat(parts, dim=-1), module.output.weight, module.output.bias)


@pytest.mark.parametrize("backend", ["auto", "reference", "sdpa", "chunked"])
def test_equals_one_head_at_a_time(backend):
    module, x, heads = make(attention_backend=backend)
    out, to_head, to_dependent = module(x, heads, None)
    torch.testing.assert_close(out, by_hand(module, x))
    assert to_head.shape == to_dependent.shape == (2, 4, 10)
    assert module(x, None, None)[1:] == (None, None)


def test_observer_sees_the_maps_before_dropout():
    module, x, heads = make(attention_dropout=0.5)
    seen = []
    _, to_head, _ = module.train()(x, heads, torch.tensor([10, 6]), seen.append)
    (probs,) = seen
    assert probs.shape == (2, 4, 10, 10)
    torch.testing.assert_close(probs.sum(-1), torch.ones(2, 4, 10))
    assert (probs[1, :, :, 6:] == 0).all()
    for b, length in enumerate((10, 6)):
        for i in range(length):
            j = int(heads[b, i])
            if 0 <= j < length:
                torch.testing.assert_close(to_head[b, :, i], probs[b, :, i, j])


def test_observed_maps_are_float32_under_autocast():
    module, x, _ = make()
    seen = []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        module(x, None, None, seen.append)
        q, k = (part.view(2, 10, 4, 12).transpose(1, 2) for part in module.qkv(x).split(48, dim=-1)[:2])
    assert seen[0].dtype == torch.float32
    assert torch.equal(seen[0], attention_probs(q, k, None, 12**-0.5))
