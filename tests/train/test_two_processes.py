"""Two processes in one job: exact resume for every ZeRO stage and precision, and the numbers of one process.

All scenarios run in one job (a fixture), because starting one costs more than training in it.
"""

from __future__ import annotations

import shutil

import pytest
import torch
from engine_runs import (
    checkpoint,
    largest_difference,
    moments,
    records,
    train,
    train_two_processes,
    weights,
)
from transformers import AutoModelForMaskedLM

from megatron_sas.export.hf import to_hf
from megatron_sas.run.reading import load_model
from megatron_sas.run.records import read_records

pytestmark = pytest.mark.slow

VARIANTS = [(stage, precision) for stage in (0, 1, 2, 3) for precision in ("fp32", "bf16")]
NO_DROPOUT = {"model.hidden_dropout": 0.0}
TERMS = {
    **NO_DROPOUT,
    "offset.schedule": [{"start": 1, "end": 4, "value": 0.2}],
    "offset.distance": 3,
    "entropy.schedule": [{"start": 0, "end": 3, "value": -0.3}],
    "masking.rate": [{"start": 0, "end": 4, "value": 0.3, "end_value": 0.15}, {"start": 4, "value": 0.15}],
}


@pytest.fixture(scope="module")
def one(config, tmp_path_factory):
    """Runs in this process that the job is compared with; `elastic` has made 2 of its 6 updates."""
    path = tmp_path_factory.mktemp("one")
    train(config, path / "whole")
    train(config, path / "elastic", {"train.steps": 2})
    return path


@pytest.fixture(scope="module")
def two(fork_server, config, one, tmp_path_factory):
    """The folder of the job's runs."""
    path = tmp_path_factory.mktemp("two")
    shutil.copytree(one / "elastic", path / "elastic")
    runs = []
    for stage, precision in VARIANTS:
        overrides = {"train.zero_stage": stage, "train.precision": precision}
        runs.append({"name": f"whole-{stage}-{precision}", "overrides": overrides})
        killed = {"copy_of": f"whole-{stage}-{precision}", "without": ["step_00000006"]}
        runs.append({"name": f"parts-{stage}-{precision}", "overrides": overrides, **killed})
    for micro in (4, 1):
        overrides = {**NO_DROPOUT, "train.micro_batch_size": micro, "train.zero_stage": 2}
        runs.append({"name": f"micro-{micro}", "overrides": overrides})
    runs.append({"name": "terms", "overrides": {**TERMS, "train.micro_batch_size": 1, "train.zero_stage": 1}})
    runs.append({"name": "sum", "overrides": {"sas.reduction": "sum"}})
    runs.append({"name": "elastic", "overrides": {"train.steps": 4, "train.zero_stage": 3}})
    source = {"run.branch_from": str(checkpoint(one / "whole", 3)), "train.zero_stage": 3}
    runs.append({"name": "branch", "overrides": source})
    runs.append({"name": "full-disk", "overrides": {"train.zero_stage": 1}, "fail_write_on_rank": 1})
    runs.append({"name": "indivisible", "overrides": {"train.micro_batch_size": 8}})
    train_two_processes(fork_server, config, path, runs)
    return path


@pytest.mark.parametrize(("stage", "precision"), VARIANTS)
def test_a_resumed_run_is_the_whole_run(two, stage, precision):
    whole, parts = two / f"whole-{stage}-{precision}", two / f"parts-{stage}-{precision}"
    assert largest_difference(weights(whole, 6), weights(parts, 6)) == 0.0
    assert largest_difference(moments(whole, 6), moments(parts, 6)) == 0.0
    events = [line["step"] for line in read_records(parts / "metrics.jsonl") if line["kind"] == "event"]
    assert events == [0, 3, 6]  # started, continued, finished
    assert records(parts) == records(whole)
    assert records(parts, "evaluation") == records(whole, "evaluation")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_processes_train_like_one(one, two, stage):
    """Same micro-batches, so the same dropout: only the order of additions differs."""
    run = two / f"whole-{stage}-fp32"
    assert largest_difference(weights(run, 6), weights(one / "whole", 6)) < 1e-5
    assert largest_difference(moments(run, 6), moments(one / "whole", 6)) < 1e-6
    for kind in ("train", "evaluation"):
        lines = records(one / "whole", kind)
        for step, line in records(run, kind).items():
            assert line == pytest.approx(lines[step], rel=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_follows_fp32(two, stage):
    """Closely enough to see a gradient that is counted twice, in the wrong units, or accumulated in bf16."""
    lines = records(two / f"whole-{stage}-fp32")
    for step, line in records(two / f"whole-{stage}-bf16").items():
        assert line["mlm_loss"] == pytest.approx(lines[step]["mlm_loss"], rel=1e-3)
        assert line["sas"] == pytest.approx(lines[step]["sas"], rel=1e-3)
        assert line["grad_norm"] == pytest.approx(lines[step]["grad_norm"], rel=1e-2)
    assert largest_difference(weights(two / f"whole-{stage}-bf16", 6), weights(two / f"whole-{stage}-fp32", 6)) > 0.0


def test_accumulation_and_world_size_do_not_matter(config, two, tmp_path):
    train(config, tmp_path / "run", {**NO_DROPOUT, "train.micro_batch_size": 8})
    for micro in (4, 1):
        assert largest_difference(weights(two / f"micro-{micro}", 6), weights(tmp_path / "run", 6)) < 5e-6
        lines = records(tmp_path / "run")
        for step, line in records(two / f"micro-{micro}").items():
            assert line == pytest.approx(lines[step], rel=5e-6)


def test_terms_depend_on_neither_accumulation_nor_world_size(config, two, tmp_path):
    train(config, tmp_path / "run", {**TERMS, "train.micro_batch_size": 8})
    assert largest_difference(weights(two / "terms", 6), weights(tmp_path / "run", 6)) < 1e-5
    for kind, names in (
        ("train", ("loss", "sas", "offset", "offset_per_edge", "entropy", "masking_rate")),
        ("evaluation", ("validation_offset", "validation_entropy")),
    ):
        lines = [
            [[line[name] for name in names] for line in read_records(run / "metrics.jsonl") if line["kind"] == kind]
            for run in (two / "terms", tmp_path / "run")
        ]
        assert lines[0] == [pytest.approx(line, rel=1e-5) for line in lines[1]]


def test_the_sum_reduction_depends_on_the_micro_batch_alone(config, two, tmp_path):
    """Averaged over ranks and accumulation alike."""
    train(config, tmp_path / "run", {"sas.reduction": "sum"})
    lines = records(tmp_path / "run")
    for step, line in records(two / "sum").items():
        assert line == pytest.approx(lines[step], rel=1e-5)


def test_a_run_may_change_its_number_of_processes_and_zero_stage(config, one, two, tmp_path):
    """Updates 1 and 2 in one process, 3 and 4 in two with ZeRO-3, 5 and 6 in one again."""
    run = tmp_path / "run"
    shutil.copytree(two / "elastic", run)
    train(config, run)
    lines = records(one / "whole")
    assert sorted(records(run)) == [1, 2, 3, 4, 5, 6]
    for step, line in records(run).items():
        assert line == pytest.approx(lines[step], rel=1e-5)
    assert largest_difference(weights(run, 6), weights(one / "whole", 6)) < 1e-5


def test_a_branch_may_have_another_number_of_processes_and_zero_stage(one, two):
    lines = records(one / "whole")
    assert sorted(records(two / "branch")) == [1, 2, 3, 4, 5, 6]
    for step, line in records(two / "branch").items():
        assert line == pytest.approx(lines[step], rel=1e-5)
    assert largest_difference(weights(two / "branch", 6), weights(one / "whole", 6)) < 1e-5


def test_a_full_disk_under_one_process_stops_all(two):
    errors = [(two / f"full-disk-error-{rank}.txt").read_text() for rank in (0, 1)]
    assert errors[0] == errors[1]
    assert "step_00000003: could not be written (rank 1: [Errno 28] No space left on device)" in errors[0]
    assert sorted(p.name for p in (two / "full-disk" / "checkpoints").iterdir()) == ["latest", "step_00000000"]


def test_wrong_input_is_the_same_error_on_every_rank(two):
    errors = [(two / f"indivisible-error-{rank}.txt").read_text() for rank in (0, 1)]
    assert errors[0] == errors[1]
    assert "8 is not a multiple of micro_batch_size 8 × 2 processes" in errors[0]
    assert not (two / "indivisible" / "checkpoints").exists()


@pytest.mark.parametrize(("stage", "precision"), [(0, "bf16"), (3, "bf16"), (3, "fp32")])
def test_sharded_checkpoints_are_exported(two, tmp_path, stage, precision):
    source = checkpoint(two / f"whole-{stage}-{precision}", 6)
    assert len(list(source.glob("optimizer-*.safetensors"))) == 2
    to_hf(source, tmp_path / "hf")
    ours, tokenizer = load_model(source)
    theirs = AutoModelForMaskedLM.from_pretrained(tmp_path / "hf").eval()
    ids = torch.randint(len(tokenizer), (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = ours(ids, masked_positions=torch.arange(64)).logits[:, : len(tokenizer)]
        assert torch.allclose(logits, theirs(ids).logits.flatten(0, 1), atol=1e-5)
