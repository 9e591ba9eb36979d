import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from megatron_sas.evaluation.batching import after_each_forward, evaluating, shard_batches


@given(st.integers(1, 40), st.integers(1, 9))
def test_every_batch_counts_once_and_all_ranks_run_equally_many(batches, ranks):
    dealt = [shard_batches(list(range(batches)), rank, ranks) for rank in range(ranks)]
    assert sorted(batch for mine in dealt for batch, counts in mine if counts) == list(range(batches))
    assert {len(mine) for mine in dealt} == {-(-batches // ranks)}


def test_evaluating_restores_the_mode_and_leaves_gradients_usable():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    for training in (True, False):
        model.train(training)
        with evaluating(model) as device:
            assert device == torch.device("cpu")
            assert not model[1].training
            assert not model(torch.ones(1, 2)).requires_grad
        assert model.training is training
        assert model[1].training is training
    model(torch.ones(1, 2)).sum().backward()


def test_something_is_called_after_each_forward_of_the_block_and_may_end_it():
    model, calls = nn.Linear(2, 2), []
    expected = model(torch.ones(1, 2))

    def call():
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return "not the model's output"

    with pytest.raises(KeyboardInterrupt), after_each_forward(model, call):
        for _ in range(5):
            assert torch.equal(model(torch.ones(1, 2)), expected)
    assert len(calls) == 3
    model(torch.ones(1, 2))
    assert len(calls) == 3
