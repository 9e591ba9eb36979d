"""Muon for matrices of the layers beside AdamW for the rest: against torch's own two, and through runs."""

from __future__ import annotations

import pytest
import torch
from engine_runs import largest_difference, moments, records, train, weights, write_inputs
from nonfinite import poisoned
from transformers import AutoModelForMaskedLM

from megatron_sas.config import load_config
from megatron_sas.core.cli import InputError
from megatron_sas.export.hf import to_hf
from megatron_sas.model.bert import Bert
from megatron_sas.model.config import BertConfig
from megatron_sas.optim.muon import MuonSection, build, unsupported_reason
from megatron_sas.optim.section import TrainSection
from megatron_sas.run.memory import count_parameters, optimizer_bytes

CONFIG = BertConfig(num_layers=2, hidden_size=32, num_heads=2, intermediate_size=64, vocab_size=70)
MUON = {"train.optimizer": "muon", "train.learning_rate": 5e-3, "checkpoint.every": 1, "evaluation.every": 6}


@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.8, "nesterov": False, "adjust_lr": "original"}], ids=["default", "other"]
)
def test_updates_are_those_of_torchs_optimizers(options):
    section = TrainSection(steps=9, micro_batch_size=1, learning_rate=1e-2, weight_decay=0.1, adam_betas=(0.8, 0.9))
    torch.manual_seed(0)
    ours, theirs = Bert(CONFIG), Bert(CONFIG)
    theirs.load_state_dict(ours.state_dict())
    optimizer = build(list(ours.named_parameters()), section, MuonSection(**options))
    matrices, embeddings, vectors = [], [], []
    for name, parameter in theirs.named_parameters():
        where = matrices if ".weight" in name and "layers." in name and "norm" not in name else embeddings
        (vectors if parameter.dim() == 1 else where).append(parameter)
    assert len(matrices) == 2 * 4  # queries, keys and values in one, output, up, down
    muon = torch.optim.Muon(
        matrices,
        lr=1e-2,
        weight_decay=0.1,
        momentum=options.get("momentum", 0.95),
        nesterov=options.get("nesterov", True),
        adjust_lr_fn=options.get("adjust_lr", "match_rms_adamw"),
    )
    rest = [{"params": embeddings, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(rest, lr=1e-2, betas=(0.8, 0.9), eps=1e-8, fused=True)
    for step in range(3):
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.grad = torch.randn(mine.shape)
            other.grad = mine.grad.clone()
        if step == 1:
            optimizer.found_inf = torch.tensor(0.0)
        optimizer.step()
        muon.step()
        adamw.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A YAML file for runs of 6 updates."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    train(config, run, MUON)
    return run


def test_a_checkpoint_holds_one_moment_for_matrices_and_two_for_the_rest(whole):
    names = set(moments(whole, 6))
    assert set(weights(whole, 6)) == {name.partition(".")[2] for name in names}
    buffers = {name.partition(".")[2] for name in names if name.startswith("momentum_buffer.")}
    assert buffers == {
        f"layers.{layer}.{part}.weight"
        for layer in (0, 1)
        for part in ("attention.qkv", "attention.output", "up", "down")
    }
    assert {f"{key}.head.dense.weight" for key in ("exp_avg", "exp_avg_sq")} <= names
    assert not any(name.startswith("exp_avg") and name.partition(".")[2] in buffers for name in names)
    assert largest_difference(weights(whole, 6), weights(whole, 0)) > 1e-3


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_has_the_same_bits(config, whole, tmp_path, precision):
    run, reference, options = tmp_path / "run", whole, {**MUON, "train.precision": precision}
    if precision == "bf16":
        reference = tmp_path / "whole"
        train(config, reference, options)
    train(config, run, {**options, "train.steps": 3})
    train(config, run, options)
    assert largest_difference(weights(run, 6), weights(reference, 6)) == 0.0
    assert largest_difference(moments(run, 6), moments(reference, 6)) == 0.0
    assert records(run) == records(reference)


@pytest.mark.parametrize("how", ["nan", "inf", "gradient", "finite gradient"])
def test_a_spoilt_update_changes_nothing(config, whole, tmp_path, how):
    run = tmp_path / "run"
    with poisoned([3], how):
        train(config, run, {**MUON, "train.steps": 3})
    assert largest_difference(weights(run, 3), weights(whole, 2)) == 0.0
    assert largest_difference(moments(run, 3), moments(whole, 2)) == 0.0
    assert records(run)[3]["grad_norm"] is None


def test_a_first_update_that_is_spoilt_leaves_momentum_at_zero(config, tmp_path):
    run = tmp_path / "run"
    with poisoned([1]):
        train(config, run, {**MUON, "train.steps": 1})
    assert not any(tensor.any() for tensor in moments(run, 1).values())


def test_a_run_keeps_its_optimizer_and_its_options(config, whole, tmp_path):
    options = {**MUON, "train.steps": 7, "run.output_dir": str(whole)}
    with pytest.raises(InputError, match=r"other values of muon\.momentum; restore"):
        train(config, whole, {**options, "muon.momentum": 0.9})
    with pytest.raises(InputError, match=r"other values of muon\..*train\.optimizer; restore"):
        train(config, whole, {**options, "train.optimizer": "adamw"})
    assert "muon:" in (whole / "config.yaml").read_text()
    train(config, tmp_path / "adamw", {"train.steps": 1, "muon.momentum": 0.9})  # not read
    assert "muon" not in (tmp_path / "adamw" / "config.yaml").read_text()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_stages_are_refused_with_the_reason(config, stage):
    with pytest.raises(InputError) as error:
        load_config(config, ["--train.optimizer", "muon", "--train.zero_stage", str(stage)])
    assert str(error.value) == (
        f"{config}: train.optimizer: muon: ZeRO stage {stage} cuts matrices into slices, and it needs whole ones; set "
        "zero_stage: 0"
    )


def test_a_torch_without_muon_is_named(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    assert unsupported_reason(0).endswith("has no torch.optim.Muon; install a newer torch, or choose adamw")


def test_bytes_are_four_for_matrices_of_the_layers_and_eight_for_the_rest():
    matrices = 2 * (3 * 32 * 32 + 32 * 32 + 2 * 32 * 64)
    assert optimizer_bytes(CONFIG, "muon") == 8 * count_parameters(CONFIG) - 4 * matrices


def test_the_model_is_exported_and_its_card_names_the_optimizer(whole, tmp_path):
    to_hf(whole, tmp_path / "hf")
    AutoModelForMaskedLM.from_pretrained(tmp_path / "hf")
    assert "Muon for matrices of the layers, AdamW for the rest, peak" in (tmp_path / "hf" / "README.md").read_text()
