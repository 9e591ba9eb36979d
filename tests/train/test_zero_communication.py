"""The shipped DeepSpeed files train, and what ZeRO communicates is what docs/scaling.md says: counted in real runs."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from engine_runs import ROOT, checkpoint, largest_difference, launch, records, train, weights
from scaling_model import collectives, modules

from megatron_sas.run.memory import count_parameters
from megatron_sas.run.reading import read_model_config

pytestmark = pytest.mark.full

JSONS = {"zero1": 1, "zero1_fp32_reduce": 1, "zero2": 2, "zero3": 3, "zero3_offload": 3}
FEW = {"train.steps": 2, "checkpoint.every": None, "evaluation.every": None}
VARIANTS = [(stage, precision) for stage in (0, 1, 2, 3) for precision in ("fp32", "bf16")]
NOTHING_KEPT = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
}
KINDS = {
    "all_reduce": "all_reduce",
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
}


@pytest.fixture(scope="module")
def jobs(config, tmp_path_factory):
    """The folder of one job of two processes: every stage and precision, and every shipped JSON."""
    path = tmp_path_factory.mktemp("zero")
    gather_always = path / "gather_always.json"
    gather_always.write_text(json.dumps({"zero_optimization": NOTHING_KEPT}))
    runs = []
    for stage, precision in VARIANTS:
        overrides = {**FEW, "train.zero_stage": stage, "train.precision": precision}
        if stage == 3:
            overrides["train.deepspeed_config"] = str(gather_always)
        runs.append({"name": f"stage{stage}-{precision}", "overrides": overrides})
    runs.append({"name": "kept", "overrides": {**FEW, "train.zero_stage": 3}})
    for name, stage in JSONS.items():
        file = str(ROOT / "examples" / "deepspeed" / f"{name}.json")
        overrides = {**FEW, "train.zero_stage": stage, "train.deepspeed_config": file}
        runs.append({"name": name, "overrides": overrides})
    runs.append({"name": "zero3_offload-bf16", "overrides": {**overrides, "train.precision": "bf16"}})
    job = path / "job.json"
    job.write_text(json.dumps({"config": str(config), "directory": str(path), "runs": runs}))
    scenarios = ROOT / "tests" / "support" / "zero_scenarios.py"
    launch("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", scenarios, job)
    return path


def counted(jobs, name):
    """(collective, bytes per element): elements, and the number of calls of each collective."""
    elements, calls = Counter(), Counter()
    for collective, number, size in json.loads((jobs / f"{name}-collectives.json").read_text()):
        elements[KINDS[collective], size] += number
        calls[KINDS[collective]] += 1
    return elements, calls


def predicted(jobs, name, stage, precision, **kept):
    shape = read_model_config(checkpoint(jobs / name, 2) / "model.json")
    messages = collectives(stage, precision, count_parameters(shape), 2, modules(shape), **kept)
    return {(m.kind, m.element_bytes): m.elements for m in messages}, {m.kind: m.calls for m in messages}


@pytest.mark.parametrize(("stage", "precision"), VARIANTS)
def test_bytes_communicated_are_the_formula(jobs, stage, precision):
    elements, calls = counted(jobs, f"stage{stage}-{precision}")
    expected_elements, expected_calls = predicted(jobs, f"stage{stage}-{precision}", stage, precision)
    assert elements == expected_elements
    if stage == 3:  # one gather per module, twice per micro-batch
        assert calls["all_gather"] == expected_calls["all_gather"]


def test_small_parameters_are_gathered_once_per_update(jobs):
    shape = read_model_config(checkpoint(jobs / "kept", 2) / "model.json")
    expected, _ = predicted(jobs, "kept", 3, "fp32", kept=count_parameters(shape))
    assert counted(jobs, "kept")[0] == expected


@pytest.fixture(scope="module")
def plain(config, tmp_path_factory):
    """The same two updates without ZeRO, in this process."""
    path = tmp_path_factory.mktemp("plain") / "run"
    train(config, path, FEW)
    return path


@pytest.mark.parametrize("name", JSONS)
def test_shipped_deepspeed_files_train_the_same_model(jobs, plain, name):
    assert largest_difference(weights(jobs / name, 2), weights(plain, 2)) < 1e-5
    lines = records(plain)
    for step, line in records(jobs / name).items():
        assert line == pytest.approx(lines[step], rel=1e-5)


def test_offloading_in_bf16(jobs, plain):
    lines = records(plain)
    for step, line in records(jobs / "zero3_offload-bf16").items():
        assert line["mlm_loss"] == pytest.approx(lines[step]["mlm_loss"], rel=1e-3)
