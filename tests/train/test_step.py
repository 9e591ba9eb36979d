"""The numbers of training: against a plain PyTorch loop, and under changes that must not matter."""

from __future__ import annotations

import functools
import types

import pytest
import torch
from bert_pairs import hf_model
from engine_runs import largest_difference, override_arguments, records, train, weights

from megatron_sas.config import load_config
from megatron_sas.data.mlm_dataset import MLMDataset
from megatron_sas.data.packed import PackedData
from megatron_sas.model.huggingface import from_hf_state
from megatron_sas.run.reading import read_model_config
from megatron_sas.train.step import own_elements

NO_DROPOUT = {"model.hidden_dropout": 0.0}


def reference_term(attentions, heads, mode, directions):
    """R of every sequence from whole maps, edge by edge: attentions L × (B, H, S, S), heads (B, S)."""
    maps = torch.stack(attentions)  # (L, B, H, S, S)
    terms = []
    for row in range(heads.shape[0]):
        edges = [(i, int(j)) for i, j in enumerate(heads[row]) if j >= 0]
        total = maps.new_zeros(())
        for name, pairs in (("to_head", edges), ("to_dependent", [(j, i) for i, j in edges])):
            if directions in ("both", name) and pairs:
                values = [maps[:, row, :, i, j] for i, j in pairs]
                if mode == "max":
                    total = total + sum(value.max() for value in values)
                else:  # p = 2
                    total = total + sum(value.square().sum() for value in values).sqrt()
        terms.append(total)
    return torch.stack(terms)


def reference_run(config, start, bert_config):
    """What the trainer should do, written with Hugging Face's model and torch's optimizer; weights and records."""
    model = hf_model(start, bert_config)
    section, size = config.train, config.train.global_batch_size
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": section.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=section.learning_rate,
        betas=section.adam_betas,
        eps=section.adam_eps,
    )
    warmup, horizon = section.warmup_steps, section.decay_horizon
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: s / warmup if s < warmup else (horizon - s) / (horizon - warmup)
    )
    packed = PackedData(config.data.train)
    data = MLMDataset(
        packed,
        seed=config.run.seed,
        mask_prob=config.data.mask_prob,
        global_batch_size=size,
        micro_batch_size=size,
        rank=0,
        world_size=1,
    )
    rows = []
    for step in range(section.steps):
        (batch,) = data.window(step).micro_batches
        output = model(batch.input_ids, output_attentions=True)
        logits = output.logits.flatten(0, 1)[batch.masked_positions]
        mlm = torch.nn.functional.cross_entropy(logits, batch.labels)
        terms = reference_term(output.attentions, batch.heads, config.sas.mode, config.sas.directions)
        micro = section.micro_batch_size
        sas = terms.mean() if config.sas.reduction == "sequence" else terms.view(-1, micro).sum(1).mean()
        weight = 0.1 if step < 4 else 0.0
        optimizer.zero_grad()
        (mlm + weight * sas).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), section.grad_clip)
        rows.append(
            {"mlm_loss": mlm.item(), "sas": sas.item(), "grad_norm": norm.item(), "lr": scheduler.get_last_lr()[0]}
        )
        rows[-1]["loss"] = rows[-1]["mlm_loss"] + weight * rows[-1]["sas"]
        optimizer.step()
        scheduler.step()
    return from_hf_state(model.state_dict(), bert_config), rows


@pytest.mark.parametrize(
    "sas",
    [
        {},
        {"sas.reduction": "sum", "sas.directions": "to_head"},
        {"sas.mode": "uniform", "sas.p": 2.0},
    ],
    ids=["max", "sum", "uniform"],
)
def test_training_equals_a_plain_pytorch_loop(config, tmp_path, sas):
    overrides = {**NO_DROPOUT, **sas, "train.steps": 5, "train.grad_clip": 0.5}
    train(config, tmp_path / "run", overrides)
    start = weights(tmp_path / "run", 0)
    bert_config = read_model_config(tmp_path / "run/checkpoints/step_00000000/model.json")
    expected, rows = reference_run(load_config(config, override_arguments(overrides)), start, bert_config)
    assert largest_difference(weights(tmp_path / "run", 5), expected) < 1e-5
    assert largest_difference(start, expected) > 1e-3  # it did move
    for step, row in enumerate(rows, start=1):
        line = records(tmp_path / "run")[step]
        assert {name: line[name] for name in row} == pytest.approx(row, rel=1e-5)
        assert row["grad_norm"] > 0.5  # so that clipping was at work


def test_accumulation_does_not_matter(config, tmp_path):
    runs = {size: tmp_path / f"micro{size}" for size in (8, 4, 2)}
    for size, run in runs.items():
        train(config, run, {**NO_DROPOUT, "train.micro_batch_size": size, "train.steps": 4})
    whole, lines = weights(runs[8], 4), records(runs[8])
    for size in (4, 2):
        assert largest_difference(weights(runs[size], 4), whole) < 2e-6
        for step, line in records(runs[size]).items():
            assert line == pytest.approx(lines[step], rel=2e-6)


def test_a_compiled_run_equals_one_that_is_not(config, tmp_path, monkeypatch):
    """Compiled as on a GPU, with fixed shapes, but for the generated code; evaluations are not compiled."""
    plain, compiled = tmp_path / "plain", tmp_path / "compiled"
    train(config, plain, {**NO_DROPOUT, "train.steps": 4})
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    train(config, compiled, {**NO_DROPOUT, "train.steps": 4, "train.compile": True})
    assert largest_difference(weights(compiled, 4), weights(plain, 4)) < 2e-6
    for step, line in records(compiled).items():
        assert line == pytest.approx(records(plain)[step], rel=2e-6)


def test_the_sum_reduction_grows_with_the_micro_batch(config, tmp_path):
    for size in (8, 2):
        overrides = {**NO_DROPOUT, "sas.reduction": "sum", "train.micro_batch_size": size, "train.steps": 1}
        train(config, tmp_path / f"micro{size}", overrides)
    lines = [records(tmp_path / f"micro{size}")[1] for size in (8, 2)]
    assert lines[0]["sas"] == pytest.approx(4 * lines[1]["sas"], rel=1e-6)
    assert lines[0]["sas_per_edge"] == pytest.approx(lines[1]["sas_per_edge"], rel=1e-6)


def test_the_loss_is_a_mean_over_masked_tokens_of_the_global_batch(config, tmp_path):
    """Against sums over single sequences, which hold different numbers of masked tokens."""
    train(config, tmp_path / "run", {**NO_DROPOUT, "train.steps": 1})
    loaded = load_config(config, override_arguments(NO_DROPOUT))
    bert_config = read_model_config(tmp_path / "run/checkpoints/step_00000000/model.json")
    model = hf_model(weights(tmp_path / "run", 0), bert_config).eval()
    data = MLMDataset(
        PackedData(loaded.data.train),
        seed=loaded.run.seed,
        mask_prob=0.15,
        global_batch_size=8,
        micro_batch_size=1,
        rank=0,
        world_size=1,
    )
    total, count, sizes = 0.0, 0, set()
    for batch in data.window(0).micro_batches:
        with torch.no_grad():
            log_probs = model(batch.input_ids).logits[0].double().log_softmax(-1)
        total -= float(log_probs[batch.masked_positions, batch.labels].sum())
        count += len(batch.labels)
        sizes.add(len(batch.labels))
    assert len(sizes) > 1
    assert records(tmp_path / "run")[1]["mlm_loss"] == pytest.approx(total / count, rel=1e-6)


OFFSET = {"offset.schedule": [{"start": 1, "end": 3, "value": 0.5}], "offset.distance": 3}


@pytest.mark.parametrize(
    "base",
    [
        {"model.attention_dropout": 0.0, "sas.schedule": [{"start": 1, "end": 3, "value": 0.1}]},
        {"model.attention_dropout": 0.1, "sas.schedule": [{"start": 1, "end": 3, "value": 0.1}]},
        {"sas.schedule": [], **OFFSET},
    ],
    ids=["plain", "dropout", "two terms"],
)
def test_records_and_evaluations_leave_training_alone(config, tmp_path, base):
    """Dropout is a function of (seed, step, micro-batch): not of what else happens between updates."""
    often = {"logging.every": 1, "evaluation.every": 1, "checkpoint.every": 1}
    seldom = {"logging.every": 4, "evaluation.every": None, "checkpoint.every": None}
    for name, more in (("often", often), ("seldom", seldom), ("other", {**seldom, "run.seed": 5})):
        train(config, tmp_path / name, {**base, **more, "train.steps": 4})
    assert largest_difference(weights(tmp_path / "often", 4), weights(tmp_path / "seldom", 4)) == 0.0
    assert largest_difference(weights(tmp_path / "often", 4), weights(tmp_path / "other", 4)) > 0.0


def test_dropout_differs_between_steps_and_micro_batches(config, tmp_path):
    """The masks of the embedding's dropout, read off its output: all differ, and a second run draws the same."""
    masks = []

    def observe(module, inputs, output):
        if module.training:
            masks.append(hash((output == 0).numpy().tobytes()))

    def prepare(trainer):
        trainer.engine.bert.embeddings.dropout.register_forward_hook(observe)

    train(config, tmp_path / "run", {"train.steps": 3}, prepare=prepare)
    first = masks.copy()
    assert len(first) == len(set(first)) == 3 * 4
    masks.clear()
    train(config, tmp_path / "again", {"train.steps": 2}, prepare=prepare)
    train(config, tmp_path / "again", {"train.steps": 3}, prepare=prepare)
    assert masks == first


def test_the_first_update_of_a_warm_up_changes_nothing_and_stages_begin_on_time(config, tmp_path):
    base = {"sas.schedule": [], "checkpoint.every": 1, "train.steps": 4}
    stage = {**base, "sas.schedule": [{"start": 2, "end": 3, "value": 5.0}]}
    train(config, tmp_path / "base", base)
    train(config, tmp_path / "stage", stage)
    lines = records(tmp_path / "stage")
    assert [lines[step]["lr"] for step in (1, 2, 3, 4)] == pytest.approx([0, 5e-4, 1e-3, 1e-3 * 97 / 98])
    assert [lines[step]["sas_weight"] for step in (1, 2, 3, 4)] == [0, 0, 5.0, 0]
    assert lines[3]["loss"] == pytest.approx(lines[3]["mlm_loss"] + 5.0 * lines[3]["sas"])
    assert largest_difference(weights(tmp_path / "base", 0), weights(tmp_path / "base", 1)) == 0.0
    differences = [
        largest_difference(weights(tmp_path / "base", step), weights(tmp_path / "stage", step)) for step in (1, 2, 3)
    ]
    assert differences[:2] == [0.0, 0.0]
    assert differences[2] > 0.0


@pytest.mark.parametrize("count", [4, 5, 6])
def test_the_norm_of_sharded_weights_leaves_out_their_padding(count):
    """A parameter over three processes in parts of two; what is beyond its end is memory as DeepSpeed found it."""
    padded = torch.cat([torch.arange(1.0, count + 1), torch.full((6 - count,), torch.nan)])
    parts = [types.SimpleNamespace(ds_numel=count, ds_tensor=part) for part in padded.split(2)]
    own = torch.cat([own_elements(part, rank) for rank, part in enumerate(parts)])
    assert own.tolist() == list(range(1, count + 1))


def test_the_sign_of_the_weight_moves_the_term(config, tmp_path):
    common = {**NO_DROPOUT, "train.steps": 12, "train.learning_rate": 1e-2, "checkpoint.every": None}
    for name, value in (("minus", 1.0), ("plus", -1.0)):
        train(config, tmp_path / name, {**common, "sas.schedule": value})
    assert records(tmp_path / "minus")[12]["sas"] < records(tmp_path / "plus")[12]["sas"]


def test_bf16_holds_where_deepspeed_switches_off_the_autocast_around_it(config, tmp_path, monkeypatch):
    """DeepSpeed asks for CUDA's autocast and disables what it finds; here it is made to see the CPU's."""
    asked, seen = torch.is_autocast_enabled, set()
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: asked(*(device or ("cpu",))))

    def note(trainer):
        bert = trainer.engine.bert
        for module in (*(m for m in bert.modules() if isinstance(m, torch.nn.Linear)), bert.head):
            module.register_forward_hook(lambda module, inputs, output: seen.add(output[0].dtype))

    overrides = {"train.precision": "bf16", "train.steps": 1, "evaluation.every": 1000}
    train(config, tmp_path / "run", overrides, prepare=note)
    assert seen == {torch.bfloat16}
