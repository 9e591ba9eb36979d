"""The section `masking`: rates by schedule and the split, in batches, in runs, and in what is refused."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from engine_runs import largest_difference, records, train, weights, write_inputs

from megatron_sas.config import load_config
from megatron_sas.core.cli import InputError
from megatron_sas.data.masking import mask_tokens
from megatron_sas.data.mlm_dataset import MLMDataset, masked_capacity
from megatron_sas.data.packed import PackedData
from megatron_sas.export.hf import to_hf
from megatron_sas.objective.masking import MaskingSection
from megatron_sas.optim.schedules import largest, mean
from megatron_sas.run.records import read_records

FALLING = [{"start": 0, "end": 4, "value": 0.3, "end_value": 0.15}, {"start": 4, "value": 0.15}]
STAGES = [
    {"start": 0, "end": 2, "value": 0.30},
    {"start": 2, "end": 4, "value": 0.15},
    {"start": 4, "value": 0.05},
]


def dataset(packed: PackedData, section: MaskingSection, **options) -> MLMDataset:
    rate = section.schedule(0.15)
    options = {"micro_batch_size": 8, "rank": 0, "world_size": 1} | options
    return MLMDataset(
        packed, seed=3, mask_prob=rate, largest_mask_prob=largest(rate), split=section.split, global_batch_size=16,
        **options,
    )  # fmt: skip


def tensors(window) -> list[torch.Tensor]:
    names = [field.name for field in fields(window.micro_batches[0]) if field.name != "index"]
    return [getattr(batch, name) for batch in window.micro_batches for name in names]


@pytest.mark.parametrize("rate", [FALLING, STAGES, {"kind": "linear", "value": 0.3, "decay_horizon": 20}, 0.4])
def test_each_step_masks_as_a_constant_rate_would(make_packed, rate):
    packed, section = PackedData(make_packed()), MaskingSection(rate=rate)
    followed = dataset(packed, section)
    for step in (5, 0, 3, 2, 4):  # in any order: a step does not depend on those before it
        constant = dataset(packed, MaskingSection(rate=section.rate(step)))
        pairs = zip(tensors(followed.window(step)), tensors(constant.window(step)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_ranks_see_the_masks_of_one_process(make_packed):
    packed, section = PackedData(make_packed()), MaskingSection(rate=FALLING, split=(0.5, 0.2, 0.3))
    alone = dataset(packed, section, micro_batch_size=4).window(2).micro_batches
    shared = [dataset(packed, section, micro_batch_size=4, rank=r, world_size=2).window(2) for r in (0, 1)]
    for batch in (batch for window in shared for batch in window.micro_batches):
        assert torch.equal(batch.input_ids, alone[batch.index].input_ids)
        assert torch.equal(batch.labels, alone[batch.index].labels)


def test_fixed_shapes_are_those_of_the_largest_rate(make_packed):
    packed = PackedData(make_packed())
    fixed = dataset(packed, MaskingSection(rate=STAGES), fixed_shapes=True)
    sizes = {len(batch.labels) for step in range(6) for batch in fixed.window(step).micro_batches}
    assert sizes == {masked_capacity(8 * 16, 0.3)}


def test_a_lower_rate_masks_some_of_the_tokens_of_a_higher_one():
    tokens = np.full((8, 512), 9)
    options = {"vocab_size": 40, "mask_id": 4, "special_ids": ()}
    few, more = (mask_tokens(tokens, np.arange(8), 0, 1, mask_prob=rate, **options) for rate in (0.15, 0.3))
    assert (few[1] <= more[1]).all() and few[1].sum() < more[1].sum()
    assert (few[0] == more[0])[few[1]].all()


@pytest.mark.parametrize("split", [(0.8, 0.1, 0.1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0.6, 0.3, 0.1)])
def test_the_split_says_what_becomes_of_masked_tokens(split):
    tokens = np.full((64, 512), 9)
    options = {"mask_prob": 0.5, "vocab_size": 1000, "mask_id": 4, "special_ids": ()}
    ids, selected = mask_tokens(tokens, np.arange(64), 0, 1, split=split, **options)
    found = ids[selected]
    shares = [(found == 4).mean(), ((found != 4) & (found != 9)).mean(), (found == 9).mean()]
    assert shares == pytest.approx(list(split), abs=0.015)
    assert (ids[~selected] == 9).all()
    if split == (0.8, 0.1, 0.1):
        assert np.array_equal(ids, mask_tokens(tokens, np.arange(64), 0, 1, **options)[0])


def test_largest_and_mean_of_schedules():
    rising = MaskingSection(rate=[{"start": 0, "end": 10, "value": 0.1, "end_value": 0.2}, {"start": 10, "value": 0.1}])
    assert largest(rising.rate) == pytest.approx(0.19)
    assert [largest(MaskingSection(rate=rate).rate) for rate in (FALLING, STAGES, 0.2)] == [0.3, 0.3, 0.2]
    assert mean(MaskingSection(rate=STAGES).rate, 6) == pytest.approx((0.3 + 0.15 + 0.05) / 3)
    assert mean(MaskingSection().schedule(0.15), 10**6) == 0.15


BAD = {
    "rate 0": ({"rate": 0}, "masking.rate: 0 is not a rate; it must be more than 0 and less than 1"),
    "rate 1": ({"rate": 1}, "masking.rate: 1 is not a rate; it must be more than 0 and less than 1"),
    "down to 0": (
        {"rate": [{"start": 0, "end": 9, "value": 0.3, "end_value": 0.0}]},
        "masking.rate: 0 is not a rate; it must be more than 0 and less than 1",
    ),
    "gap": (
        {"rate": [{"start": 0, "end": 2, "value": 0.3}, {"start": 4, "value": 0.15}]},
        "masking.rate: no stage covers steps 2 to 4; stages of a rate must leave no gap",
    ),
    "late": (
        {"rate": [{"start": 3, "value": 0.3}]},
        "masking.rate: no stage covers steps 0 to 3; stages of a rate must leave no gap",
    ),
    "short": (
        {"rate": [{"start": 0, "end": 5, "value": 0.3}]},
        "masking.rate: is 0 from step 5 on, before the end of train.steps 6; lengthen its last part",
    ),
    "warm-up": (
        {"rate": {"kind": "wsd", "value": 0.3, "decay_horizon": 90, "warmup_steps": 2}},
        "masking.rate.warmup_steps: a rate cannot begin at 0; leave it out",
    ),
    "horizon": (
        {"rate": {"kind": "linear", "value": 0.3, "decay_horizon": 5}},
        "masking.rate: is 0 from step 5 on, before the end of train.steps 6; lengthen its last part",
    ),
    "split": (
        {"split": [0.8, 0.1, 0.2]},
        "masking.split: 0.8, 0.1, 0.2 add up to 1.1; give three shares of at least 0 that make 1",
    ),
    "negative share": (
        {"split": [1.1, -0.1, 0]},
        "masking.split: 1.1, -0.1, 0 add up to 1; give three shares of at least 0 that make 1",
    ),
    "overlap": (
        {"rate": [{"start": 0, "value": 0.3}, {"start": 4, "value": 0.15}]},
        "masking.rate: stages 0 and 1 overlap: stage 0 lasts for ever, stage 1 starts at 4",
    ),
    "kind": (
        {"rate": {"kind": "step"}},
        "masking.rate: should be a list of stages or a kind: linear, cosine, wsd, not",
    ),
    "field": (
        {"rate": {"kind": "linear", "value": 0.3, "decay_horizons": 5}},
        "masking.rate.decay_horizons: unknown field; did you mean decay_horizon?",
    ),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_are_refused_in_a_line(config, name):
    import json

    settings, message = BAD[name]
    with pytest.raises(InputError) as error:
        load_config(config, [f"--masking.{field}={json.dumps(value)}" for field, value in settings.items()])
    assert message in str(error.value)
    if name != "field":
        assert "\n" not in str(error.value)


def test_defaults_are_left_out_of_the_yaml_and_others_survive_it(config, tmp_path):
    assert "masking" not in load_config(config).to_yaml()
    for arguments in (["--masking.rate=0.2"], ['--masking.rate={"kind": "wsd", "value": 0.3, "decay_horizon": 90}']):
        loaded = load_config(config, [*arguments, "--masking.split=[1, 0, 0]"])
        (tmp_path / "again.yaml").write_text(loaded.to_yaml())
        assert load_config(tmp_path / "again.yaml") == loaded


RUN = {"model.hidden_dropout": 0.0, "masking.rate": FALLING, "masking.split": [0.9, 0.05, 0.05]}


@pytest.fixture(scope="module")
def scheduled(config, tmp_path_factory):
    run = tmp_path_factory.mktemp("scheduled") / "run"
    train(config, run, RUN)
    return run


def test_a_constant_rate_of_mask_prob_is_the_default(config, tmp_path):
    for name, overrides in (("default", {}), ("said", {"masking.rate": 0.15})):
        train(config, tmp_path / name, {"train.steps": 2, **overrides})
    assert largest_difference(weights(tmp_path / "default", 2), weights(tmp_path / "said", 2)) == 0.0
    assert records(tmp_path / "default") == records(tmp_path / "said")


def test_records_have_the_rate(scheduled):
    lines = [line for line in read_records(scheduled / "metrics.jsonl") if line["kind"] == "train"]
    assert [line["masking_rate"] for line in lines] == pytest.approx([0.3, 0.2625, 0.225, 0.1875, 0.15, 0.15])


def test_validation_keeps_its_rate_and_split(config, scheduled, tmp_path):
    """At step 0 the model is the same, whatever training masks."""
    train(config, tmp_path / "run", {"model.hidden_dropout": 0.0, "train.steps": 1})
    name = "validation_mlm_loss"
    assert records(tmp_path / "run", "evaluation")[0][name] == records(scheduled, "evaluation")[0][name]


def test_a_run_resumes_exactly_and_refuses_other_masking(config, scheduled, tmp_path):
    run = tmp_path / "run"
    train(config, run, {**RUN, "train.steps": 3})
    train(config, run, RUN)
    assert largest_difference(weights(run, 6), weights(scheduled, 6)) == 0.0
    assert records(run) == records(scheduled)
    with pytest.raises(InputError, match=r"started with other values of masking\.rate, masking\.split; restore"):
        train(config, run, {"model.hidden_dropout": 0.0, "train.steps": 7})


def test_a_branch_may_change_what_follows(config, scheduled, tmp_path):
    source = {**RUN, "run.branch_from": str(scheduled / "checkpoints" / "step_00000003")}
    other = [{"start": 0, "end": 4, "value": 0.3, "end_value": 0.15}, {"start": 4, "value": 0.05}]
    train(config, tmp_path / "branch", {**source, "masking.rate": other})
    lines = {line["step"]: line for line in read_records(tmp_path / "branch" / "metrics.jsonl")}
    assert [lines[step]["masking_rate"] for step in (4, 5)] == pytest.approx([0.1875, 0.05])
    with pytest.raises(InputError, match=r"masking\.rate says 0\.15 for update 1, which was made with 0\.3; keep"):
        train(config, tmp_path / "early", {**source, "masking.rate": 0.15})


def test_the_card_of_an_exported_model_says_how_tokens_were_masked(scheduled, tmp_path):
    to_hf(scheduled, tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert (
        "(each token masked with probability 0.3 to 0.15 in steps 0 to 4, 0.15 from step 4; of these 90% to [" in card
    )
