"""Hidden states at given positions are those of the full computation, whatever else is asked of the model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bert_pairs import SMALL, SMALL_MODERN, perturbed_bert, random_ids
from interpreter import interpret_kernels

interpret_kernels()

BATCH, SEQ = 3, 14
FAR = replace(SMALL_MODERN, num_layers=3, local_attention=6)  # its last layer is local
HEADS = torch.randint(-1, SEQ, (BATCH, 2, SEQ), generator=torch.Generator().manual_seed(2))
HEADS[0, 0, 3] = SEQ - 1  # an edge whose head is the last token
POSITIONS = {
    "some": torch.tensor([3, 5, 16, 40, 41]),
    "filled up": torch.tensor([5, 9, 20, 33, 0, 0, 0]),
    "none": torch.zeros(0, dtype=torch.int64),
    "all": torch.randperm(BATCH * SEQ, generator=torch.Generator().manual_seed(3)),
}
ASKED = {
    "nothing": {},
    "edges": {"heads": HEADS[:, 0]},
    "several sets": {"heads": HEADS},
    "queries": {"queries_keys": True},
    "lengths": {"seqlens": torch.tensor([14, 1, 9])},
    "lengths and edges": {"seqlens": torch.tensor([14, 1, 9]), "heads": HEADS[:, 0]},
}


def outputs_and_gradients(model, ids, positions, asked, few, read=None):
    """Hidden states `(M, C)`, all else that a forward returns, and every parameter's gradient through both.

    `read`: how many of the M have a gradient; None: all.
    """
    model.zero_grad()
    output = model(ids, only_at=positions, **asked) if few else model(ids, **asked)
    hidden = output.hidden if few else output.hidden.flatten(0, 1)[positions]
    queries_keys = [x for layer in output.queries_keys for x in (layer.q, layer.k)]
    returned = [hidden[:read], *output.to_head, *output.to_dependent, *queries_keys]
    generator = torch.Generator().manual_seed(4)
    sum((x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in returned).backward()
    used = [p for name, p in model.named_parameters() if not name.startswith("head.")]
    return returned, [p.grad if p.grad is not None else torch.zeros_like(p) for p in used]


def check_equal(config, asked, dtype=torch.float64, seq=SEQ, kinds=POSITIONS, training=True, **tolerance):
    model, ids = perturbed_bert(config).to(dtype).train(training), random_ids(config, BATCH, seq)
    for name in kinds:
        positions = POSITIONS[name] % (BATCH * seq)
        few, full = (outputs_and_gradients(model, ids, positions, asked, few) for few in (True, False))
        torch.testing.assert_close(few, full, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", ["auto", "chunked", "reference"])
@pytest.mark.parametrize("config", [SMALL, SMALL_MODERN, FAR], ids=["bert", "modernbert", "local"])
def test_hidden_states_at_some_positions_are_the_full_ones(config, backend, training, asked):
    check_equal(replace(config, attention_backend=backend), ASKED[asked], training=training)


@pytest.mark.parametrize("config", [SMALL, FAR], ids=["bert", "local"])
@pytest.mark.parametrize("asked", [{}, {"heads": torch.zeros(BATCH, 1, dtype=torch.int64)}], ids=["nothing", "edges"])
@pytest.mark.parametrize("training", [True, False])
def test_sequences_of_one_token(config, training, asked):
    check_equal(config, asked, seq=1, training=training)


def test_on_our_own_kernels():
    config = replace(SMALL, num_layers=1, num_heads=2, attention_backend="triton")
    if torch.cuda.is_available():
        pytest.skip("they compute on CPU tensors in an interpreter, where there is no GPU")
    check_equal(config, ASKED["edges"], torch.float32, kinds=["filled up"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("config", [SMALL, FAR], ids=["bert", "local"])
def test_gradient_of_few_of_the_rows(config):
    """The backward leaves out rows without a gradient, each of which may see other keys than the rest."""
    model, ids = perturbed_bert(config).double().eval(), random_ids(config, BATCH, SEQ)
    both = [outputs_and_gradients(model, ids, POSITIONS["all"], {}, few, read=4) for few in (True, False)]
    torch.testing.assert_close(*both)


def test_an_observer_sees_every_query():
    model, ids = perturbed_bert(SMALL).eval(), random_ids(SMALL, BATCH, SEQ)
    positions, seen = POSITIONS["some"], {}
    with torch.no_grad():
        expected = model(ids)
        for observer in (None, lambda layer, q, k, window: seen.update({layer: q})):
            output = model(ids, masked_positions=positions, query_key_observer=observer)
            torch.testing.assert_close(output.hidden, expected.hidden.flatten(0, 1)[positions])
            torch.testing.assert_close(output.logits, model.logits(expected.hidden.flatten(0, 1))[positions])
    assert [q.shape[2] for q in seen.values()] == [SEQ] * 3


def test_only_the_rows_that_are_read_are_computed():
    """In the last layer: the output and what follows; in evaluations that ask for nothing else queries too."""
    model, ids, rows = perturbed_bert(SMALL).eval(), random_ids(SMALL, BATCH, SEQ), {}
    for name, module in model.layers[-1].named_modules():
        module.register_forward_hook(lambda _m, _i, out, name=name: rows.update({name: out[0].shape[:-1]}))
    model(ids, only_at=POSITIONS["some"])
    assert rows["attention.qkv"] == (BATCH, 2)  # queries: two of the sequence that has most
    assert {rows[name] for name in ("attention.output", "attention_norm", "up", "down")} == {()}
    for training, asked in ((False, ASKED["edges"]), (True, {})):
        model.train(training)(ids, only_at=POSITIONS["some"], **asked)
        assert rows["attention.qkv"] == (BATCH, SEQ) and rows["up"] == ()
