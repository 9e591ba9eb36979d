"""Training on a GPU: against the CPU, resumed, and without waiting for the device; skipped where there is none."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from engine_runs import ROOT, largest_difference, launch, moments, override_arguments, records, weights

from megatron_sas.config import load_config

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed"),
]

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


def pretrain(config: Path, run: Path, overrides: dict, **environment: str) -> str:
    """A run in a process of its own; what it printed."""
    arguments = override_arguments({**overrides, "run.output_dir": str(run)})
    return launch(ROOT / "pretrain_mlm.py", "--config", config, *arguments, **environment)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_run_follows_the_same_run_on_the_cpu(config, tmp_path, compiled):
    overrides = {"model.hidden_dropout": 0.0, "train.precision": "fp32", "train.compile": compiled}
    pretrain(config, tmp_path / "gpu", overrides)
    pretrain(config, tmp_path / "cpu", overrides | {"train.compile": False}, **NO_GPU)
    assert sorted(records(tmp_path / "gpu")) == list(range(1, 7))
    for step, line in records(tmp_path / "cpu").items():
        assert records(tmp_path / "gpu")[step] == pytest.approx(line, rel=1e-4)
    assert largest_difference(weights(tmp_path / "gpu", 6), weights(tmp_path / "cpu", 6)) < 1e-4


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_resumed_run_equals_an_uninterrupted_one(config, tmp_path, zero_stage):
    overrides = {"train.precision": "bf16", "train.zero_stage": zero_stage, "train.deterministic": True}
    overrides |= {"model.attention_dropout": 0.1}
    pretrain(config, tmp_path / "whole", overrides)
    pretrain(config, tmp_path / "parts", overrides | {"train.steps": 3})
    pretrain(config, tmp_path / "parts", overrides)
    assert largest_difference(weights(tmp_path / "parts", 6), weights(tmp_path / "whole", 6)) == 0.0
    assert largest_difference(moments(tmp_path / "parts", 6), moments(tmp_path / "whole", 6)) == 0.0
    assert records(tmp_path / "parts") == records(tmp_path / "whole")


@pytest.mark.parametrize("offset", [[], [{"start": 1, "end": 4, "value": 0.5}]])
def test_how_often_lines_are_printed_does_not_show_in_the_weights(config, tmp_path, offset):
    """Terms of weight 0 are measured only for them."""
    overrides = {"train.precision": "bf16", "train.deterministic": True, "sas.schedule": [], "offset.schedule": offset}
    for every in (1, 6):
        pretrain(config, tmp_path / str(every), overrides | {"logging.every": every})
    assert largest_difference(weights(tmp_path / "1", 6), weights(tmp_path / "6", 6)) == 0.0
    assert largest_difference(moments(tmp_path / "1", 6), moments(tmp_path / "6", 6)) == 0.0


def test_an_update_does_not_wait_for_the_gpu(config):
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_gpu_training as t; t.updates()"
    assert "nothing waited" in launch("-c", code, config)


def updates() -> None:
    """Updates of ZeRO-0 in bf16 from the prefetching loader; in a process of their own, since it joins a group."""
    from megatron_sas.data.loader import PrefetchLoader
    from megatron_sas.launch.environment import initialize_distributed
    from megatron_sas.objective.pretraining import MaskedLMWithTerms
    from megatron_sas.train.build import build_state
    from megatron_sas.train.step import Engine

    config = load_config(sys.argv[1], override_arguments({"train.precision": "bf16", "model.attention_dropout": 0.1}))
    device = initialize_distributed(config.run.timeout_minutes)
    parts = build_state(config, lambda _: None)
    engine = Engine(MaskedLMWithTerms(parts.bert, config.terms()), config.train, config.run.seed, device)
    with PrefetchLoader(parts.dataset, 0, 6, pin_memory=True) as loader:
        windows = list(loader)
    for window in windows[:4]:  # compiles, searches for tiles, allocates
        engine.update(window, {"sas": 0.1}, measure=True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")

    def refuse(*_: object) -> None:
        raise AssertionError("an update waits for the whole device")  # which the debug mode does not see

    torch.cuda.synchronize = refuse  # DeepSpeed's accelerator calls it by this name
    for window in windows[4:]:
        engine.update(window, {"sas": 0.1}, measure=True)
    torch.cuda.set_sync_debug_mode("default")
    print("nothing waited")


def test_bf16_computes_in_bf16(config):
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_gpu_training as t; t.dtypes()"
    assert "{torch.bfloat16}" in launch("-c", code, config)


def dtypes() -> None:
    """What the layers' matrices compute in, in an update of ZeRO-0 under bf16; in a process of its own."""
    from megatron_sas.launch.environment import initialize_distributed
    from megatron_sas.objective.pretraining import MaskedLMWithTerms
    from megatron_sas.train.build import build_state
    from megatron_sas.train.step import Engine

    overrides = {"train.precision": "bf16", "train.compile": False}
    config = load_config(sys.argv[1], override_arguments(overrides))
    device = initialize_distributed(config.run.timeout_minutes)
    parts = build_state(config, lambda _: None)
    engine = Engine(MaskedLMWithTerms(parts.bert, config.terms()), config.train, config.run.seed, device)
    seen = set()
    for layer in parts.bert.layers:
        layer.up.register_forward_hook(lambda module, given, result: seen.add(result.dtype))
    engine.update(parts.dataset.window(0), {"sas": 0.1}, measure=True)
    print(seen)
