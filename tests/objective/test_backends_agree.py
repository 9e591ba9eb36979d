"""A model trained with any attention backend follows the same loss curve, also with dropout where masks are shared."""

from __future__ import annotations

import functools

import pytest
import torch

from megatron_sas.model.bert import Bert
from megatron_sas.model.config import BertConfig
from megatron_sas.objective.pretraining import MaskedLMWithTerms
from megatron_sas.objective.sas import SasSection, SasTerm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPS = 50 if DEVICE == "cuda" else 25
LAYOUT = (4, 60) if DEVICE == "cuda" else (1, 24)  # heads and tokens: an interpreter takes its time
WITHOUT_DROPOUT = ["sdpa"] if DEVICE == "cpu" else ["flex"]


@functools.cache
def curve(backend: str, dropout_p: float) -> torch.Tensor:
    """Loss (both terms) of `STEPS` updates, float64 `(steps,)`, of a small model that learns a fixed batch by heart."""
    torch.manual_seed(0)
    config = BertConfig(
        num_layers=1, hidden_size=32, num_heads=LAYOUT[0], intermediate_size=64, vocab_size=60,
        max_position_embeddings=64, initializer_range=0.15, hidden_dropout=0.0, attention_dropout=dropout_p,
        attention_backend=backend,
    )  # fmt: skip
    module = MaskedLMWithTerms(Bert(config), {"sas": SasTerm(SasSection())}).to(DEVICE).train()
    batch, seq = 2, LAYOUT[1]
    tokens = torch.randint(5, 60, (batch, seq))
    heads = (torch.arange(seq) + torch.randint(-3, 4, (batch, seq))).clamp(-1, seq - 1)
    heads[1] = -1  # a sequence without parses
    positions = torch.arange(0, batch * seq, 5)
    labels = tokens.flatten()[positions]
    masked = tokens.flatten().index_fill(0, positions, 4).view(batch, seq)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1 / STEPS)
    losses = []
    for step in range(STEPS):
        torch.manual_seed(step)
        inputs = (x.to(DEVICE) for x in (masked, positions, labels, heads))
        parts = module(*inputs, mlm_scale=1 / len(labels), term_scales={"sas": 0.02})
        losses.append(float(parts.loss.detach()))
        optimizer.zero_grad()
        parts.loss.backward()
        optimizer.step()
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "dropout_p"),
    [
        pytest.param("triton", 0.0, marks=pytest.mark.full),  # dropout asks for more, and the interpreter is slow
        *(("triton", 0.5), ("chunked", 0.0), ("chunked", 0.5)),
        *((backend, 0.0) for backend in WITHOUT_DROPOUT),
    ],
)
def test_same_loss_curve(backend, dropout_p):
    expected = curve("reference", dropout_p)
    assert expected[-1] < 0.5 * expected[0]
    torch.testing.assert_close(curve(backend, dropout_p), expected, rtol=2e-4, atol=0)


def test_dropout_is_seen():
    """The tolerance above tells masks apart."""
    assert not torch.allclose(curve("reference", 0.0), curve("reference", 0.5), rtol=2e-3)
