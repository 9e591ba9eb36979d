"""The seeds of a run's parts: each changes what it is of and nothing else."""

from __future__ import annotations

import pytest
import torch
from engine_runs import largest_difference, records, train, weights, write_inputs

from megatron_sas.config import load_config
from megatron_sas.core.cli import InputError
from megatron_sas.export.hf import to_hf
from megatron_sas.run.directory import Seeds, describe_seeds


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def plain(config, tmp_path_factory):
    run = tmp_path_factory.mktemp("plain") / "run"
    train(config, run, {"train.steps": 2, "run.seed": 5})
    return run


def test_seeds_are_that_of_the_run_by_default(config):
    loaded = load_config(config, ["--run.seed=5"])
    assert loaded.seeds() == Seeds(5, 5, 5)
    assert load_config(config, ["--run.seed=5", "--seed.data=7"]).seeds() == Seeds(5, 7, 5)
    assert "seed:" not in loaded.to_yaml().replace("  seed: 5", "")


def test_all_seeds_given_are_the_run_with_that_seed(config, plain, tmp_path):
    seeds = {f"seed.{part}": 5 for part in ("init", "data", "dropout")}
    train(config, tmp_path / "run", {"train.steps": 2, "run.seed": 1, **seeds})
    assert largest_difference(weights(tmp_path / "run", 2), weights(plain, 2)) == 0.0
    assert records(tmp_path / "run") == records(plain)


@pytest.mark.parametrize("part", ["init", "data", "dropout"])
def test_a_seed_changes_its_part_alone(config, plain, tmp_path, part):
    """`init` the weights at step 0, `data` the batches, `dropout` nothing where there is none."""
    run = tmp_path / "run"
    trainer = train(config, run, {"train.steps": 2, "run.seed": 5, f"seed.{part}": 6})
    initial = largest_difference(weights(run, 0), weights(plain, 0))
    assert (initial > 0) == (part == "init")
    assert (records(run, "evaluation")[0] == records(plain, "evaluation")[0]) == (part != "init")
    assert largest_difference(weights(run, 2), weights(plain, 2)) > 0
    other = train(config, tmp_path / "other", {"train.steps": 1, "run.seed": 6 if part == "data" else 5})
    assert trainer.built.samples_of(1) == other.built.samples_of(1)
    pairs = zip(*(t.built.state.dataset.window(0).micro_batches for t in (trainer, other)), strict=True)
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in pairs)
    if part == "dropout":
        for name, seed in (("a", 5), ("b", 6)):
            settings = {"train.steps": 2, "model.hidden_dropout": 0.0, "run.seed": 5, "seed.dropout": seed}
            train(config, tmp_path / name, settings)
        assert largest_difference(weights(tmp_path / "a", 2), weights(tmp_path / "b", 2)) == 0.0


def test_a_run_resumes_with_its_seeds_and_refuses_others(config, tmp_path):
    seeds = {"seed.init": 3, "seed.data": 4, "seed.dropout": 5}
    train(config, tmp_path / "whole", {**seeds, "train.steps": 4})
    train(config, tmp_path / "parts", {**seeds, "train.steps": 3})
    train(config, tmp_path / "parts", {**seeds, "train.steps": 4})
    assert largest_difference(weights(tmp_path / "parts", 4), weights(tmp_path / "whole", 4)) == 0.0
    with pytest.raises(InputError, match=r"started with other values of seed\.data; restore"):
        train(config, tmp_path / "parts", {**seeds, "seed.data": 9, "train.steps": 6})
    source = {"run.branch_from": str(tmp_path / "whole"), "train.steps": 6}
    with pytest.raises(InputError, match=r"other values of seed\.dropout \(5, not null\); restore"):
        train(config, tmp_path / "branch", {**seeds, **source, "seed.dropout": None})
    to_hf(tmp_path / "whole", tmp_path / "hf")
    assert "| seed | 1234, init 3, data 4, dropout 5 |" in (tmp_path / "hf" / "README.md").read_text()


def test_descriptions_name_what_differs():
    assert describe_seeds({"run": {"seed": 1}}) == 1
    assert describe_seeds({"run": {"seed": 1}, "seed": {"init": 1, "data": 2, "dropout": None}}) == "1, data 2"
    assert describe_seeds({}) is None


def test_a_negative_seed_is_refused(config):
    with pytest.raises(InputError, match=r"seed\.init: input should be greater than or equal to 0, not -1"):
        load_config(config, ["--seed.init=-1"])
