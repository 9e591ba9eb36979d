"""DeepSpeed's configuration: what the YAML decides, and what a user's JSON may add."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_sas.cli import InputError
from megatron_sas.config_sections import TrainSection
from megatron_sas.engine.deepspeed_config import FIXED, OWNED, deepspeed_config


def section(**fields) -> TrainSection:
    return TrainSection(**({"steps": 10, "global_batch_size": 32, "micro_batch_size": 4, "warmup_steps": 0} | fields))


def with_json(tmp_path: Path, content: object, **fields) -> dict:
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return deepspeed_config(section(deepspeed_config=str(path), **fields), world_size=2)


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_batch_sizes_are_what_deepspeed_expects(world_size, accumulation):
    config = deepspeed_config(section(), world_size)
    assert config["gradient_accumulation_steps"] == accumulation
    assert config["train_batch_size"] == 32 == 4 * accumulation * world_size
    assert config["train_micro_batch_size_per_gpu"] == 4


@pytest.mark.parametrize("world_size", [3, 16])
def test_batch_that_does_not_divide(world_size):
    with pytest.raises(InputError, match=f"train.global_batch_size: 32 .* 4 × {world_size} processes"):
        deepspeed_config(section(), world_size)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precision_and_clipping_by_stage(stage, precision):
    config = deepspeed_config(section(zero_stage=stage, precision=precision, grad_clip=0.5), 1)
    assert config["zero_optimization"]["stage"] == stage
    assert config["bf16"]["enabled"] == (precision == "bf16" and stage > 0)
    assert ("data_types" in config) == config["bf16"]["enabled"]
    assert config["gradient_clipping"] == (0.5 if stage else 0.0)


@pytest.mark.parametrize("key", [*OWNED, *FIXED])
def test_what_the_yaml_owns_is_refused_by_name(tmp_path, key):
    with pytest.raises(InputError) as error:
        with_json(tmp_path, {key: 1, "wall_clock_breakdown": False})
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'ds.json'}: must not set {key} (")
    assert message.endswith("in the YAML instead)" if key in OWNED else "; remove it)")


def test_every_fault_is_named_at_once(tmp_path):
    with pytest.raises(InputError) as error:
        with_json(tmp_path, {"fp16": {}, "optimizer": {}, "zero_optimization": {"stage": 2}})
    for part in ("fp16 (set train.precision", "optimizer (set", "zero_optimization.stage (set train.zero_stage"):
        assert part in str(error.value)


def test_the_rest_is_passed_on(tmp_path):
    extra = {"zero_optimization": {"overlap_comm": True}, "wall_clock_breakdown": True, "steps_per_print": 7}
    config = with_json(tmp_path, extra, zero_stage=2)
    assert config["zero_optimization"] == {"overlap_comm": True, "stage": 2}
    assert config["wall_clock_breakdown"] is True
    assert config["steps_per_print"] == 7


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "ds.json: is not valid JSON"),
        ([1], "ds.json: must hold a JSON object"),
        ({"zero_optimization": 3}, "ds.json: zero_optimization must be an object, not 3"),
    ],
)
def test_broken_json(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        with_json(tmp_path, content)


def test_absent_json(tmp_path):
    with pytest.raises(InputError, match=r"train\.deepspeed_config: .*absent\.json: no such file"):
        deepspeed_config(section(deepspeed_config=str(tmp_path / "absent.json")), 1)
