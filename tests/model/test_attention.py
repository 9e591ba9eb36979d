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
    query, key, value = module.qkv(x)
    parts = []
    for h in range(4):
        columns = slice(12 * h, 12 * (h + 1))
        scores = query[..., columns] @ key[..., columns].transpose(1, 2) / 12**0.5
        parts.append(scores.softmax(-1) @ value[..., columns])
    return F.linear(torch.cat(parts, dim=-1), module.output.weight, module.output.bias)


@pytest.mark.parametrize("backend", ["auto", "reference", "sdpa", "chunked"])
def test_equals_one_head_at_a_time(backend):
    module, x, heads = make(attention_backend=backend)
    out, to_head, to_dependent, _ = module(x, heads, None)
    torch.testing.assert_close(out, by_hand(module, x))
    assert to_head.shape == to_dependent.shape == (2, 4, 10)
    assert module(x, None, None)[1:] == (None, None, None)


def test_observer_sees_the_queries_and_keys_of_the_map():
    module, x, heads = make(attention_dropout=0.5)
    seen = []
    lengths = torch.tensor([10, 6])
    _, to_head, *_ = module.train()(x, heads, lengths, lambda *qk: seen.append(qk))
    ((q, k),) = seen
    probs = attention_probs(q, k, lengths, 12**-0.5)
    assert probs.shape == (2, 4, 10, 10)
    for b, length in enumerate((10, 6)):
        for i in range(length):
            j = int(heads[b, i])
            if 0 <= j < length:
                torch.testing.assert_close(to_head[b, :, i], probs[b, :, i, j])
