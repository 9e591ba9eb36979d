"""Attention at a fixed distance: against whole maps in float64, beside the SAS term, and through a run."""

from __future__ import annotations

import pytest
import torch
from bert_pairs import hf_gradients, hf_twin
from engine_runs import largest_difference, records, train, weights, write_inputs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_sas.config import load_config
from megatron_sas.core.cli import InputError
from megatron_sas.export.hf import to_hf
from megatron_sas.model.bert import Bert
from megatron_sas.model.config import BertConfig
from megatron_sas.objective.base import Batch
from megatron_sas.objective.offset import OffsetSection, OffsetTerm
from megatron_sas.objective.pretraining import MaskedLMWithTerms
from megatron_sas.objective.sas import SasSection, SasTerm
from megatron_sas.run.records import read_records

PAD, CLS, SEP, MASK = SPECIAL = (0, 2, 3, 4)


def make_batch(batch: int, seq: int, seed: int) -> tuple[Batch, list[list[bool]]]:
    """Random tokens with [CLS], [SEP] and padding of uneven lengths; and which positions hold ordinary tokens.

    Masked tokens become [MASK], another token, which may be special, or themselves; the list of them is filled up.
    """
    torch.manual_seed(seed)
    ids = torch.randint(5, 61, (batch, seq))
    lengths = torch.randint(1, seq + 1, (batch, 1))
    positions = torch.arange(seq)
    ids[:, 0] = CLS
    ids = torch.where(positions == lengths - 1, SEP, torch.where(positions >= lengths, PAD, ids))
    ordinary = ids > MASK
    chosen = (ordinary & (torch.rand(batch, seq) < 0.3)).flatten().nonzero().squeeze(1)
    labels = ids.flatten()[chosen]
    replacement = torch.tensor([MASK, PAD, SEP, CLS, 7])[torch.randint(5, chosen.shape)]
    masked = ids.flatten().index_put((chosen,), replacement).view_as(ids)
    filled = torch.cat([chosen, torch.zeros(3, dtype=torch.int64)])
    heads = torch.where(ordinary, torch.randint(-1, seq, (batch, seq)), -1)
    return Batch(masked, filled, torch.cat([labels, torch.full((3,), -100)]), heads), ordinary.tolist()


def make_model(**terms: OffsetSection | SasSection) -> MaskedLMWithTerms:
    config = BertConfig(
        num_layers=2, hidden_size=32, num_heads=4, intermediate_size=64, vocab_size=61, max_position_embeddings=64,
        hidden_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    bert = Bert(config)
    with torch.no_grad():
        for name, parameter in bert.named_parameters():
            parameter += torch.randn_like(parameter) * (0.4 if "qkv.weight" in name else 0.05)
    classes = {"sas": SasTerm, "offset": OffsetTerm}
    return MaskedLMWithTerms(bert, {name: classes[name](section, SPECIAL) for name, section in terms.items()}).double()


def by_maps(maps: Tensor, edges: list[list[tuple[int, int]]], section: OffsetSection | SasSection) -> Tensor:
    """R of the whole batch from maps `(L, B, H, S, S)`, edge by edge."""
    total = maps.new_zeros(())
    for b, pairs in enumerate(edges):
        for name, wanted in (("to_head", pairs), ("to_dependent", [(j, i) for i, j in pairs])):
            if section.directions in ("both", name) and wanted:
                values = [maps[:, b, :, i, j].flatten() for i, j in wanted]
                if section.mode == "max":
                    total = total + sum(value.max() for value in values)
                else:
                    total = total + torch.cat(values).pow(section.p).sum() ** (1 / section.p)
    return total


def offset_edges(ordinary: list[list[bool]], distance: int) -> list[list[tuple[int, int]]]:
    return [
        [(i, i + distance) for i, ok in enumerate(row) if ok and 0 <= i + distance < len(row) and row[i + distance]]
        for row in ordinary
    ]


SETTINGS = st.sampled_from(
    [{}, {"directions": "to_head"}, {"directions": "to_dependent"}, {"mode": "uniform"}, {"mode": "uniform", "p": 2.5}]
)


@settings(max_examples=25, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 3),
    seq=st.sampled_from([2, 5, 9, 17, 33]),
    distance=st.sampled_from([-7, -2, -1, 1, 2, 3, 40]),
    chosen=SETTINGS,
    beside=st.sampled_from([None, {}, {"mode": "uniform", "p": 2.0}]),
)
def test_value_and_gradient_equal_those_of_maps_in_float64(seed, batch, seq, distance, chosen, beside):
    """Alone, and beside the SAS term, whose edges are others over the same attention."""
    inputs, ordinary = make_batch(batch, seq, seed)
    sections = {"offset": OffsetSection(distance=distance, **chosen)}
    edges = {"offset": offset_edges(ordinary, distance)}
    if beside is not None:
        sections["sas"] = SasSection(**beside)
        edges["sas"] = [[(i, j) for i, j in enumerate(row) if j >= 0] for row in inputs.heads.tolist()]
    module = make_model(**sections)
    scales = {name: scale for name, scale in (("offset", 0.7), ("sas", -0.3)) if name in sections}
    parts = module(
        inputs.input_ids, inputs.masked_positions, inputs.labels, inputs.heads, mlm_scale=0.0, term_scales=scales
    )
    twin = hf_twin(module.bert).double()
    output = twin(inputs.input_ids, output_attentions=True)
    maps, expected = torch.stack(output.attentions), 0.0 * output.logits.sum()
    for name, section in sections.items():
        term = by_maps(maps, edges[name], section)
        torch.testing.assert_close(parts.term_sums[name], term, rtol=1e-9, atol=1e-12)
        assert parts.edge_counts[name] == sum(map(len, edges[name]))
        expected = expected + scales[name] * term
    parts.loss.backward()
    expected.backward()
    theirs = hf_gradients(twin, module.bert)
    for name, parameter in module.bert.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name], rtol=1e-7, atol=1e-9)


def test_edges_of_a_sentence_by_hand():
    """A masked word is an end as good as another, also where a special token was drawn for it."""
    ids = torch.tensor([[CLS, 10, MASK, SEP, 12, MASK, SEP, PAD, PAD]])
    positions, labels = torch.tensor([2, 3, 0]), torch.tensor([11, 13, -100])  # (0, 3) is a word, drawn as [SEP]
    batch = Batch(ids, positions, labels, torch.full_like(ids, -1))
    right, left = (OffsetTerm(OffsetSection(distance=d), SPECIAL).edges(batch) for d in (1, -2))
    assert right.tolist() == [[-1, 2, 3, 4, -1, -1, -1, -1, -1]]  # (0, 5) is a [MASK] of the text itself
    assert left.tolist() == [[-1, -1, -1, 1, 2, -1, -1, -1, -1]]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Runs of 6 updates, half of whose sequences have no parse."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))


BOTH = {
    "model.hidden_dropout": 0.0,
    "offset.schedule": [{"start": 1, "end": 4, "value": 0.2}],
    "offset.distance": -2,
}


@pytest.fixture(scope="module")
def both(config, tmp_path_factory):
    run = tmp_path_factory.mktemp("both") / "run"
    train(config, run, BOTH)
    return run


def test_two_terms_have_schedules_and_metrics_of_their_own(both, capsys):
    lines = {line["step"]: line for line in read_records(both / "metrics.jsonl") if line["kind"] == "train"}
    assert [lines[step]["offset_weight"] for step in range(1, 7)] == [0, 0.2, 0.2, 0.2, 0, 0]
    assert [lines[step]["sas_weight"] for step in range(1, 7)] == [0.1, 0.1, 0.1, 0.1, 0, 0]
    for line in lines.values():
        expected = line["mlm_loss"] + line["sas_weight"] * line["sas"] + line["offset_weight"] * line["offset"]
        assert line["loss"] == pytest.approx(expected, rel=1e-12)
        assert 0 < line["offset_per_edge"] < 1
        assert line["offset"] > line["sas"]  # nearly every token has an edge, in all sequences
    evaluations = [line for line in read_records(both / "metrics.jsonl") if line["kind"] == "evaluation"]
    assert all(line["validation_offset"] > line["validation_sas"] > 0 for line in evaluations)


def test_neither_accumulation_nor_records_matter(config, both, tmp_path):
    train(config, tmp_path / "whole", {**BOTH, "train.micro_batch_size": 8})
    assert largest_difference(weights(tmp_path / "whole", 6), weights(both, 6)) < 5e-6
    names = ("loss", "sas", "sas_per_edge", "grad_norm")
    for step, line in records(tmp_path / "whole").items():
        assert [line[name] for name in names] == pytest.approx([records(both)[step][name] for name in names], rel=5e-6)
    train(config, tmp_path / "seldom", {**BOTH, "logging.every": 6})
    assert largest_difference(weights(tmp_path / "seldom", 6), weights(both, 6)) == 0.0


def test_a_run_with_two_terms_resumes_exactly_and_refuses_another_distance(config, both, tmp_path):
    run = tmp_path / "run"
    train(config, run, {**BOTH, "train.steps": 3})
    train(config, run, BOTH)
    assert largest_difference(weights(run, 6), weights(both, 6)) == 0.0
    with pytest.raises(InputError, match=r"other values of offset\.distance; restore"):
        train(config, run, {**BOTH, "offset.distance": 2, "train.steps": 7})
    with pytest.raises(InputError, match=r"other values of offset\.schedule, "):
        train(config, run, {"model.hidden_dropout": 0.0, "train.steps": 7})


def test_without_a_weight_the_term_is_no_part_of_a_run(config, tmp_path):
    train(config, tmp_path / "run", {"train.steps": 1, "offset.distance": 3})
    assert not any("offset" in name for line in read_records(tmp_path / "run" / "metrics.jsonl") for name in line)
    assert "offset" not in (tmp_path / "run" / "config.yaml").read_text()
    assert load_config(tmp_path / "run" / "config.yaml").offset == OffsetSection()


def test_a_branch_may_add_the_term(config, tmp_path):
    train(config, tmp_path / "parent", {"train.steps": 3})
    source = {"run.branch_from": str(tmp_path / "parent"), "offset.distance": 2}
    with pytest.raises(InputError, match=r"offset\.schedule says λ = 0.3 for update 1, which was made with λ = 0"):
        train(config, tmp_path / "early", {**source, "offset.schedule": 0.3})
    train(config, tmp_path / "branch", {**source, "offset.schedule": [{"start": 3, "value": 0.3}]})
    found = {line["step"]: line.get("offset_weight") for line in read_records(tmp_path / "branch" / "metrics.jsonl")}
    assert [found[step] for step in (1, 2, 3)] == [None, None, None]
    assert [found[step] for step in (4, 5)] == [0.3, 0.3]


def test_both_terms_are_in_the_card_of_an_exported_model(both, tmp_path):
    to_hf(both, tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "| λ of offset | 0.2 in steps 1 to 4, then 0 |" in card
    assert "| R of offset | distance -2, mode max, directions both, reduction sequence |" in card
    assert "| offset term on held-out text, per sequence |" in card


def test_a_distance_of_zero_is_refused(config):
    with pytest.raises(InputError, match=r"offset\.distance: must not be 0"):
        load_config(config, ["--offset.distance", "0"])
