"""What live evaluations record of attention, and the warning when a regularizer takes it away from everything."""

from __future__ import annotations

import pytest
import torch
from engine_runs import checkpoint, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_sas.config import load_config
from megatron_sas.data.mlm_dataset import validation_batches
from megatron_sas.data.packed import PackedData
from megatron_sas.evaluation.text import VALIDATION_SEED
from megatron_sas.run.reading import load_model
from megatron_sas.run.records import read_records


def of_maps(model, packed: PackedData) -> dict[str, torch.Tensor]:
    """Entropy, and attention to [CLS] and [SEP], from whole maps in float64: means over tokens, (L, H) each."""
    (batch,) = validation_batches(
        packed, micro_batch_size=10, num_sequences=10, seed=VALIDATION_SEED, mask_prob=0.15, rank=0, world_size=1
    )
    maps = []
    with torch.no_grad():
        model(batch.input_ids, attention_observer=lambda _, probs: maps.append(probs.double()))
    maps = torch.stack(maps)  # (L, B, H, S, S)
    to_special = [
        (maps * (batch.input_ids == token)[:, None, None, :]).sum(-1)
        for token in (packed.tokenizer.cls_id, packed.tokenizer.sep_id)
    ]
    values = [torch.special.entr(maps).sum(-1), *to_special]
    return {name: x.mean(dim=(1, 3)) for name, x in zip(("entropy", "to_cls", "to_sep"), values, strict=True)}


def test_live_statistics_are_those_of_the_maps(config, tmp_path):
    """Ten validation sequences in batches of three: the last batch is filled up with rows that must not count."""
    run = tmp_path / "run"
    train(config, run, {"train.steps": 3, "evaluation.batch_tokens": 3 * 32, "logging.tensorboard": True})
    lines = {line["step"]: line for line in read_records(run / "metrics.jsonl") if line["kind"] == "evaluation"}
    assert sorted(lines) == [0, 3]
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    for step, line in lines.items():
        model, _ = load_model(checkpoint(run, step))
        found = line["validation_attention"]
        for name, per_head in of_maps(model, PackedData(load_config(config).data.validation)).items():
            torch.testing.assert_close(torch.tensor(found[name]["per_head"]).double(), per_head, rtol=1e-5, atol=1e-6)
            assert found[name]["mean"] == pytest.approx(float(per_head.mean()), rel=1e-5)
            points = {p.step: p.value for p in board.Scalars(f"validation_attention/{name}/mean")}
            assert points[step] == pytest.approx(found[name]["mean"], rel=1e-6)
        assert found["uniform_entropy"] == pytest.approx(torch.tensor(32.0).log().item(), rel=1e-6)
        assert found["collapsed_heads"] == 0.0


def collapse(trainer):
    """Make every head attend to one token, as queries and keys a thousand times as large do."""
    with torch.no_grad():
        for layer in trainer.engine.bert.layers:
            layer.attention.qkv.weight.mul_(1000.0)


def test_collapse_is_warned_of_once_also_over_a_resume(config, tmp_path, capsys):
    run, every = tmp_path / "run", {"evaluation.every": 1}
    train(config, run, {**every, "train.steps": 3}, prepare=collapse)
    out = capsys.readouterr().out
    assert out.count("warning: attention has collapsed under sas λ = 0.1: its entropy is 0.") == 1
    assert "step 1: warning: attention has collapsed" in out  # not of the untrained model
    train(config, run, every)
    assert "collapsed" not in capsys.readouterr().out
    events = [r for r in read_records(run / "metrics.jsonl") if r.get("event") == "attention_collapsed"]
    assert [(event["step"], event["heads"]) for event in events] == [(1, 1.0)]
    assert 0.0 <= events[0]["entropy"] < 0.1
    assert 0.0 < events[0]["to_special"] < 0.2


def test_without_a_regularizer_nothing_is_warned_of(config, tmp_path, capsys):
    overrides = {"evaluation.every": 1, "train.steps": 2, "sas.schedule": []}
    train(config, tmp_path / "run", overrides, prepare=collapse)
    evaluations = [line for line in read_records(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "evaluation"]
    assert [line["validation_attention"]["collapsed_heads"] for line in evaluations] == [1.0, 1.0, 1.0]
    assert "collapsed" not in capsys.readouterr().out


def test_small_attention_along_edges_is_printed_in_significant_digits(config, tmp_path, capsys):
    """As after a collapse, when four decimals would be zeros."""

    def tiny(step, values):
        values["sas_per_edge"] *= 1e-5

    train(config, tmp_path / "run", {"train.steps": 2}, observer=tiny)
    lines = [line for line in read_records(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "train"]
    assert [line["step"] for line in lines] == [1, 2]
    out = capsys.readouterr().out
    for line in lines:
        assert 0.0 < line["sas_per_edge"] < 1e-5
        assert f"  sas/edge {line['sas_per_edge']:.3g}  " in out
