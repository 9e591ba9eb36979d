"""Gradients under DeepSpeed as configured here: every stage, both precisions and every shipped JSON, in real updates.

AdamW's first moment after an update tells the gradient that it was given, whatever DeepSpeed did with it before.
"""

from __future__ import annotations

from collections import defaultdict

import deepspeed
import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from engine_runs import ROOT, largest_difference, moments, records, train, weights, write_inputs

from megatron_sas.evaluation.batching import evaluating

BETA = 0.9  # AdamW's first, by default
CASES = [(0, None), (1, "zero1"), (1, "zero1_fp32_reduce"), (2, "zero2"), (3, "zero3"), (3, "zero3_offload")]
# Steep enough for DeepSpeed's own clipping, at 1.0, to show.
STEEP = {"sas.schedule": 20.0, "checkpoint.every": 1, "evaluation.every": None, "data.validation": None}


def overrides(stage, precision, json=None, **more):
    file = {"train.deepspeed_config": str(ROOT / "examples" / "deepspeed" / f"{json}.json")} if json else {}
    return {**STEEP, "train.zero_stage": stage, "train.precision": precision, **file, **more}


def first_moments(run, step):
    saved = moments(run, step)
    return {name.removeprefix("exp_avg."): t for name, t in saved.items() if name.startswith("exp_avg.")}


def norm(tensors):
    return float(torch.cat([tensor.double().flatten() for tensor in tensors.values()]).norm())


def distance(first, second):
    """Of two sets of tensors, relative to the second."""
    assert first.keys() == second.keys()
    return norm({name: first[name].double() - second[name].double() for name in first}) / norm(second)


@pytest.fixture
def gradients(monkeypatch):
    """Name of a parameter: its gradient in each micro-batch, as autograd computes it, before DeepSpeed has it."""
    found, initialize = defaultdict(list), deepspeed.initialize

    def observed(*, model, **options):
        for name, parameter in model.bert.named_parameters():
            parameter.register_hook(lambda gradient, name=name: found[name].append(gradient.clone()))
        return initialize(model=model, **options)

    monkeypatch.setattr(deepspeed, "initialize", observed)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("stage", "json"), CASES)
def test_an_update_takes_the_float32_sum_of_its_micro_batches(config, tmp_path, gradients, stage, json, precision):
    """Without clipping; in bf16 the sum is not that of bf16 numbers, which DeepSpeed makes by default.

    ZeRO-1 rounds it to bf16 for the reduction over processes, unless the JSON says otherwise.
    """
    run, rounded = tmp_path / "run", (json, precision) == ("zero1", "bf16")
    train(config, run, overrides(stage, precision, json, **{"train.steps": 2, "train.grad_clip": 0}))
    before = {name: torch.zeros_like(tensor) for name, tensor in first_moments(run, 1).items()}
    for step in (1, 2):
        parts = {name: seen[4 * step - 4 : 4 * step] for name, seen in gradients.items()}
        expected = {name: sum(part.float() for part in seen) for name, seen in parts.items()}
        if rounded:
            expected = {name: total.bfloat16().float() for name, total in expected.items()}
        after = first_moments(run, step)
        assert distance({name: (after[name] - BETA * before[name]) / (1 - BETA) for name in after}, expected) < 1e-6
        assert records(run)[step]["grad_norm"] == pytest.approx(norm(expected), rel=1e-4)
        assert norm(expected) > 2
        before = after
        if precision == "bf16" and stage > 0:
            assert distance({name: sum(seen[1:], seen[0]) for name, seen in parts.items()}, expected) > 1e-4
    assert all(len(seen) == 8 for seen in gradients.values())
    assert largest_difference(weights(run, 2), weights(run, 1)) > 0


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_clipping_is_the_yamls(config, tmp_path, stage, precision):
    run = tmp_path / "run"
    train(config, run, overrides(stage, precision, **{"train.steps": 1, "train.grad_clip": 0.1}))
    assert norm(first_moments(run, 1)) / (1 - BETA) == pytest.approx(0.1, rel=1e-4)
    assert records(run)[1]["grad_norm"] > 2


@pytest.mark.slow
def test_a_modernbert_trains_alike_at_every_stage(tmp_path):
    """And in bf16, and with Muon for its matrices; and what is then evaluated, whose queries take part of a weight."""
    config, runs, logits = write_inputs(tmp_path, "modernbert"), {}, {}
    ids = torch.arange(5, 45).view(2, 20)
    cases = [(stage, precision, "adamw") for stage in (0, 1, 2, 3) for precision in ("fp32", "bf16")]
    for stage, precision, optimizer in (*cases, (0, "fp32", "muon")):
        name = f"{stage}-{precision}-{optimizer}"
        more = {"train.steps": 2, "train.optimizer": optimizer, "model.mlp_dropout": 0.0, "evaluation.every": None}
        trainer = train(config, tmp_path / name, {"train.zero_stage": stage, "train.precision": precision, **more})
        runs[name] = records(tmp_path / name)[2]
        bert = trainer.engine.bert
        with trainer.engine.evaluation(), evaluating(bert):
            logits[name] = bert(ids, masked_positions=torch.tensor([3, 30])).logits[:, :60].float()
    expected = runs["0-fp32-adamw"]
    for name, found in runs.items():
        close = 1e-5 if "fp32-adamw" in name else 0.02
        assert found["loss"] == pytest.approx(expected["loss"], rel=close), name
        assert found["sas"] == pytest.approx(expected["sas"], rel=2 * close), name
        torch.testing.assert_close(logits[name], logits["0-fp32-adamw"], rtol=0, atol=1e-4 if close < 0.01 else 0.1)
    decayed = [p.dim() for p in moments(tmp_path / "0-fp32-muon", 2).values()]
    assert {1, 2} == set(decayed)
    names = {name for name in moments(tmp_path / "0-fp32-muon", 2) if name.startswith("momentum_buffer.")}
    of_a_layer = ("attention.qkv", "attention.output", "up", "down")
    assert names == {f"momentum_buffer.layers.{i}.{part}.weight" for i in range(2) for part in of_a_layer}


def test_deepspeed_alone_clips_and_ignores_what_it_does_not_know():
    """Why the configuration sets the key always, and refuses unknown ones."""
    section = {"train_batch_size": 1}
    assert DeepSpeedConfig(section).gradient_clipping == 1.0
    assert DeepSpeedConfig({**section, "gradient_cliping": 0.1}).gradient_clipping == 1.0
    assert DeepSpeedConfig({**section, "gradient_clipping": 0.0}).gradient_clipping == 0.0
