"""The learning rate against transformers' schedule."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import get_linear_schedule_with_warmup

from megatron_sas.optim.learning_rate import learning_rate


@settings(max_examples=30, deadline=None)
@given(warmup=st.integers(0, 20), decay=st.integers(1, 40), peak=st.floats(1e-6, 1.0))
def test_equals_transformers(warmup, decay, peak):
    horizon = warmup + decay
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    schedule = get_linear_schedule_with_warmup(optimizer, warmup, horizon)
    for step in range(horizon + 5):
        ours = learning_rate(step, peak=peak, warmup_steps=warmup, decay_horizon=horizon)
        assert ours == pytest.approx(schedule.get_last_lr()[0], rel=1e-12, abs=1e-18)
        optimizer.step()
        schedule.step()


def test_the_papers_schedule():
    rates = [learning_rate(s, peak=1e-4, warmup_steps=10_000, decay_horizon=1_000_000) for s in (0, 1, 10_000, 100_000)]
    assert rates == pytest.approx([0.0, 1e-8, 1e-4, 1e-4 * 900_000 / 990_000])
