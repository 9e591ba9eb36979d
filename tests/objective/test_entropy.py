"""The entropy of attention as a term: against whole maps in float64, beside other terms, and through a run."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch
from bert_pairs import hf_gradients, hf_twin
from engine_runs import largest_difference, records, train, weights, write_inputs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from megatron_sas.core.cli import InputError
from megatron_sas.export.hf import to_hf
from megatron_sas.kernels.reference import attention_probs
from megatron_sas.model.architectures import build_model
from megatron_sas.model.attention import QueriesKeys
from megatron_sas.model.bert import Bert
from megatron_sas.model.config import BertConfig
from megatron_sas.model.modernbert import ModernBertConfig
from megatron_sas.objective.base import Batch, Counts
from megatron_sas.objective.entropy import EntropySection, EntropyTerm
from megatron_sas.objective.offset import OffsetSection, OffsetTerm
from megatron_sas.objective.pretraining import MaskedLMWithTerms
from megatron_sas.objective.sas import SasSection, SasTerm
from megatron_sas.run.records import read_records

PAD, CLS, SEP, MASK = SPECIAL = (0, 2, 3, 4)


def make_batch(batch: int, seq: int, seed: int) -> tuple[Batch, Tensor]:
    """Random tokens, with padding of uneven lengths; and which positions, bool `(B, S)`, are no padding.

    Some tokens are masked, which may put the id of padding in their place; the list of them is filled up.
    """
    torch.manual_seed(seed)
    ids = torch.randint(5, 61, (batch, seq))
    real = torch.arange(seq) < torch.randint(1, seq + 1, (batch, 1))
    chosen = (real & (torch.rand(batch, seq) < 0.3)).flatten().nonzero().squeeze(1)
    labels = ids.flatten()[chosen]
    ids = torch.where(real, ids, PAD)
    masked = ids.flatten().index_put((chosen,), torch.tensor([MASK, PAD])[torch.randint(2, chosen.shape)]).view_as(ids)
    filled = torch.cat([chosen, torch.zeros(3, dtype=torch.int64)])
    heads = torch.where(real, torch.randint(-1, seq, (batch, seq)), -1)
    return Batch(masked, filled, torch.cat([labels, torch.full((3,), -100)]), heads), real


def make_model(terms: list[str]) -> MaskedLMWithTerms:
    config = BertConfig(
        num_layers=2, hidden_size=32, num_heads=4, intermediate_size=64, vocab_size=61, max_position_embeddings=64,
        hidden_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    bert = Bert(config)
    with torch.no_grad():
        for name, parameter in bert.named_parameters():
            parameter += torch.randn_like(parameter) * (0.4 if "qkv.weight" in name else 0.05)
    made = {
        "sas": SasTerm(SasSection(mode="uniform"), SPECIAL),
        "offset": OffsetTerm(OffsetSection(distance=-1, mode="uniform"), SPECIAL),
        "entropy": EntropyTerm(EntropySection(), SPECIAL),
    }
    return MaskedLMWithTerms(bert, {name: made[name] for name in terms}).double()


def by_maps(maps: Tensor, real: Tensor) -> Tensor:
    """R of every sequence, `(B,)`, from maps `(L, B, H, S, S)`, row by row."""
    entropy = torch.where(maps > 0, -maps * torch.where(maps > 0, maps, 1.0).log(), 0.0).sum(-1)  # (L, B, H, S)
    return torch.stack([entropy[:, b][:, :, row].mean() for b, row in enumerate(real)])


@settings(max_examples=20, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 3),
    seq=st.sampled_from([1, 2, 5, 17, 33]),
    beside=st.sampled_from([[], ["sas"], ["sas", "offset"]]),
    scale=st.sampled_from([0.7, -0.3]),
)
def test_value_and_gradient_equal_those_of_maps_in_float64(seed, batch, seq, beside, scale):
    """Alone, and beside terms along edges; λ of either sign."""
    inputs, real = make_batch(batch, seq, seed)
    module = make_model([*beside, "entropy"])
    alone = make_model(beside)
    arguments = (inputs.input_ids, inputs.masked_positions, inputs.labels, inputs.heads)
    parts = module(*arguments, mlm_scale=0.0, term_scales={**dict.fromkeys(beside, 0.2), "entropy": scale})
    twin = hf_twin(module.bert).double()
    output = twin(inputs.input_ids, output_attentions=True)
    expected = by_maps(torch.stack(output.attentions), real).sum()
    torch.testing.assert_close(parts.term_sums["entropy"], expected, rtol=1e-9, atol=1e-12)
    assert "entropy" not in parts.edge_counts
    parts.loss.backward()
    (0.0 * output.logits.sum() + scale * expected).backward()
    alone(*arguments, mlm_scale=0.0, term_scales=dict.fromkeys(beside, 0.2)).loss.backward()
    theirs, others = hf_gradients(twin, module.bert), dict(alone.bert.named_parameters())
    for name, parameter in module.bert.named_parameters():
        other = others[name].grad
        wanted = theirs[name] if other is None else theirs[name] + other
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-7, atol=1e-9)


def test_local_layers_have_the_entropy_of_what_they_see():
    """Of two layers, one with a window; padding is no row, but is attended to."""
    inputs, real = make_batch(2, 12, 3)
    layers = [QueriesKeys(*torch.randn(2, 2, 3, 12, 8).double().requires_grad_(), window) for window in (None, 4)]
    term = EntropyTerm(EntropySection(), SPECIAL)
    found = term(SimpleNamespace(queries_keys=layers), inputs)
    maps = [attention_probs(q, k, None, 8**-0.5, window and (2, 2)) for q, k, window, _ in layers]
    expected = by_maps(torch.stack(maps), real)
    torch.testing.assert_close(found, expected)
    wanted = [x for q, k, *_ in layers for x in (q, k)]
    for mine, true in zip(*(torch.autograd.grad(x.sum(), wanted) for x in (found, expected)), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-7, atol=1e-9)


def test_a_modernbert_has_the_entropy_of_its_own_maps():
    """Global and local layers, with rotated queries and keys; gradients of all weights."""
    inputs, real = make_batch(2, 24, 5)
    config = ModernBertConfig(
        num_layers=4, hidden_size=32, num_heads=4, intermediate_size=48, vocab_size=61, max_position_embeddings=64,
        local_attention=6, pad_token_id=PAD,
    )  # fmt: skip
    torch.manual_seed(0)
    module = MaskedLMWithTerms(build_model(config), {"entropy": EntropyTerm(EntropySection(), SPECIAL)}).double()
    parts = module(*vars(inputs).values(), mlm_scale=0.0, term_scales={"entropy": -0.3})
    parts.loss.backward()
    found = {name: p.grad.clone() for name, p in module.bert.named_parameters() if p.grad is not None}
    module.zero_grad()
    maps = []
    module.bert(inputs.input_ids, attention_observer=lambda layer, probs: maps.append(probs))
    expected = by_maps(torch.stack(maps), real).sum()
    torch.testing.assert_close(parts.term_sums["entropy"], expected.detach(), rtol=1e-9, atol=1e-12)
    (-0.3 * expected).backward()
    for name, parameter in module.bert.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-7, atol=1e-9)


def test_the_kernel_is_that_of_the_layers_where_it_hands_out_entropy(monkeypatch):
    """`auto` would take sdpa here, and the reference hands out no logsumexp."""
    asked = []

    def entropy(q, k, *, window, backend):
        asked.append(backend)
        return q.sum(-1)

    monkeypatch.setattr("megatron_sas.objective.entropy.attention_entropy", entropy)
    ids = torch.randint(5, 30, (2, 8))
    batch = Batch(ids, torch.zeros(1, dtype=torch.int64), torch.full((1,), -100), torch.full_like(ids, -1))
    for backend, expected in (("chunked", "chunked"), ("reference", "auto"), ("auto", "auto")):
        sizes = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "vocab_size": 32}
        bert = Bert(BertConfig(**sizes, attention_dropout=0.0, attention_backend=backend))
        EntropyTerm(EntropySection())(bert(ids, queries_keys=True), batch)
        assert asked.pop() == expected


def test_a_sequence_of_padding_counts_nothing():
    batch = Batch(torch.full((2, 4), PAD), torch.zeros(1, dtype=torch.int64), torch.tensor([-100]), torch.empty(0))
    layer = QueriesKeys(*torch.randn(2, 2, 1, 4, 8), None)
    assert EntropyTerm(EntropySection(), SPECIAL)(SimpleNamespace(queries_keys=[layer]), batch).tolist() == [0.0, 0.0]


def test_metrics_are_means_over_the_global_batch():
    assert EntropyTerm(EntropySection()).metrics(12.0, Counts(8, 4, 0)) == {"entropy": 1.5}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


STEERED = {"model.hidden_dropout": 0.0, "entropy.schedule": [{"start": 1, "end": 4, "value": -0.5}]}


@pytest.fixture(scope="module")
def steered(config, tmp_path_factory):
    run = tmp_path_factory.mktemp("steered") / "run"
    train(config, run, STEERED)
    return run


def entropies(run) -> list[float | None]:
    return [line.get("entropy") for line in read_records(run / "metrics.jsonl") if line["kind"] == "train"]


def test_a_run_records_prints_and_shows_weight_and_entropy(config, steered, tmp_path, capsys):
    lines = {line["step"]: line for line in read_records(steered / "metrics.jsonl") if line["kind"] == "train"}
    assert [lines[step]["entropy_weight"] for step in range(1, 7)] == [0, -0.5, -0.5, -0.5, 0, 0]
    for line in lines.values():
        expected = line["mlm_loss"] + line["sas_weight"] * line["sas"] + line["entropy_weight"] * line["entropy"]
        assert line["loss"] == pytest.approx(expected, rel=1e-12)
    train(config, tmp_path / "run", {**STEERED, "train.steps": 2, "logging.tensorboard": True})
    assert f"entropy {lines[2]['entropy']:.3g}  λ -0.5" in capsys.readouterr().out
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert board.Scalars("train/entropy")[1].value == pytest.approx(lines[2]["entropy"], rel=1e-6)
    assert [point.value for point in board.Scalars("train/entropy_weight")] == [0.0, -0.5]
    evaluations = [line for line in read_records(steered / "metrics.jsonl") if line["kind"] == "evaluation"]
    for line in evaluations:
        assert line["validation_entropy"] == pytest.approx(line["validation_attention"]["entropy"]["mean"], rel=1e-5)


def test_the_sign_of_the_weight_says_which_way_entropy_goes(config, tmp_path):
    rate = {"sas.schedule": 0, "train.learning_rate": 1e-2, "train.warmup_steps": 0, "model.hidden_dropout": 0.0}
    for name, weight in (("up", -20.0), ("measured", [{"start": 0, "value": 0.0}]), ("down", 20.0)):
        train(config, tmp_path / name, {**rate, "train.learning_rate": 1e-2, "entropy.schedule": weight})
    up, measured, down = (entropies(tmp_path / name)[-1] for name in ("up", "measured", "down"))
    assert down < measured - 1e-3
    assert up > measured


def test_it_is_computed_only_where_due(config, steered, tmp_path):
    """With records written at the last step alone, the others have it only where λ is not 0, and the same weights."""
    train(config, tmp_path / "seldom", {**STEERED, "logging.every": 6})
    assert [value is not None for value in entropies(tmp_path / "seldom")] == [False, True, True, True, False, True]
    assert largest_difference(weights(tmp_path / "seldom", 6), weights(steered, 6)) == 0.0


def test_accumulation_does_not_matter(config, steered, tmp_path):
    train(config, tmp_path / "whole", {**STEERED, "train.micro_batch_size": 8})
    assert largest_difference(weights(tmp_path / "whole", 6), weights(steered, 6)) < 5e-6
    assert entropies(tmp_path / "whole") == pytest.approx(entropies(steered), rel=5e-6)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_does_not_matter(config, steered, tmp_path, stage):
    train(config, tmp_path / "run", {**STEERED, "train.zero_stage": stage})
    assert largest_difference(weights(tmp_path / "run", 6), weights(steered, 6)) < 1e-5
    assert entropies(tmp_path / "run") == pytest.approx(entropies(steered), rel=1e-5)


def test_measuring_leaves_dropout_and_weights_alone(config, tmp_path):
    """The second pass draws no random numbers."""
    dropout = {"model.attention_dropout": 0.1, "train.steps": 3}
    train(config, tmp_path / "without", dropout)
    train(config, tmp_path / "measured", {**dropout, "entropy.schedule": [{"start": 0, "value": 0.0}]})
    assert largest_difference(weights(tmp_path / "without", 3), weights(tmp_path / "measured", 3)) == 0.0
    assert records(tmp_path / "without") == records(tmp_path / "measured")


def test_a_compiled_run_equals_one_that_is_not(config, steered, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    train(config, tmp_path / "run", {**STEERED, "train.steps": 4, "train.compile": True})
    assert entropies(tmp_path / "run") == pytest.approx(entropies(steered)[:4], rel=1e-5)
    assert largest_difference(weights(tmp_path / "run", 3), weights(steered, 3)) < 2e-6


def test_a_run_resumes_exactly_and_keeps_its_weight(config, steered, tmp_path):
    run = tmp_path / "run"
    train(config, run, {**STEERED, "train.steps": 3})
    train(config, run, STEERED)
    assert largest_difference(weights(run, 6), weights(steered, 6)) == 0.0
    with pytest.raises(InputError, match=r"other values of entropy\.schedule; restore"):
        train(config, run, {**STEERED, "entropy.schedule": -0.5, "train.steps": 7})


def test_the_card_of_an_exported_model_names_the_term(steered, tmp_path):
    to_hf(steered, tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "| λ of entropy | −0.5 in steps 1 to 4, then 0 |" in card
    assert "| R of entropy | mean over layers, heads and tokens, in nats |" in card
    assert "| entropy of attention on held-out text, per sequence |" in card
