"""The reference against plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from attention_cases import make_case

from megatron_sas.kernels import dependency_attention


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
