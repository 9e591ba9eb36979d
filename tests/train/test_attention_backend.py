"""An attention backend that cannot train the configured model is an error of the configuration, before training."""

from __future__ import annotations

import pytest
import torch
from engine_runs import train

from megatron_sas.core.cli import InputError
from megatron_sas.launch import kernel_cache
from megatron_sas.model.config import BertConfig

CPU = torch.device("cpu")


def config_with(backend: str, dropout: float) -> BertConfig:
    return BertConfig(num_heads=2, hidden_size=32, attention_dropout=dropout, attention_backend=backend)


@pytest.mark.parametrize(
    ("backend", "dropout", "reason"),
    [
        ("flex", 0.1, "the kernel has no attention dropout"),
        ("flex", 0.0, "FlexAttention has no backward on CPU"),
        ("fa4", 0.1, "the kernel has no attention dropout"),
        ("sdpa", 0.1, "torch's CPU flash kernel has no attention dropout"),
        ("cudnn", 0.0, "cuDNN's flash kernel needs a GPU, not tensors on cpu"),
    ],
)
def test_impossible_backends(backend, dropout, reason):
    message = f"model.attention_backend: {backend}: {reason}; choose auto"
    with pytest.raises(InputError) as error:
        kernel_cache.check_attention_backend(config_with(backend, dropout), 16, torch.float32, CPU)
    assert str(error.value) == message


def test_a_run_with_an_impossible_backend_leaves_no_directory(config, tmp_path):
    with pytest.raises(InputError, match=r"model.attention_backend: flex: .*; choose auto"):
        train(config, tmp_path / "run", {"model.attention_backend": "flex"})
    assert not (tmp_path / "run").exists()


def test_a_run_with_a_faulty_deepspeed_configuration_leaves_no_directory(config, tmp_path):
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"reduce_bucket_size": "big"}}')
    with pytest.raises(InputError, match=r"ds.json: zero_optimization.reduce_bucket_size must be a whole number"):
        train(config, tmp_path / "run", {"train.deepspeed_config": str(tmp_path / "ds.json")})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("backend", "dropout"), [("auto", 0.1), ("chunked", 0.1), ("reference", 0.1), ("sdpa", 0.0)])
def test_possible_backends(backend, dropout):
    kernel_cache.check_attention_backend(config_with(backend, dropout), 16, torch.float32, CPU)
