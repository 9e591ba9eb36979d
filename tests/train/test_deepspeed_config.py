"""DeepSpeed's configuration: what the YAML decides, and what a user's JSON may add."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig
from deepspeed.utils.config import get_timers_config
from engine_runs import ROOT

from megatron_sas.core.cli import InputError
from megatron_sas.optim.section import TrainSection
from megatron_sas.train.deepspeed_config import ALLOWED, FIXED, OWNED, deepspeed_config


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
        outer, _, inner = key.rpartition(".")
        with_json(tmp_path, {outer: {inner: 1}} if outer else {key: 1, "wall_clock_breakdown": False})
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'ds.json'}: must not set {key} (")
    assert message.endswith("in the YAML instead)" if key in OWNED else "; remove it)")


def test_whatever_else_is_refused_by_name(tmp_path):
    zero = {"compute_grad_norm": False, "zero_quantized_gradients": True, "offload_optimizer": {"ratio": 0.5}}
    with pytest.raises(InputError) as error:
        with_json(tmp_path, {"zero_optimization": zero, "comms_logger": {}, "gradient_allreduce_op": "", "compile": {}})
    message = str(error.value)
    assert "\n" not in message
    for part in (
        "zero_optimization.offload_optimizer.ratio (docs/zero.md lists what may be set; remove the rest)",
        "zero_optimization.compute_grad_norm, zero_optimization.zero_quantized_gradients (docs/zero.md lists",
        "gradient_allreduce_op, compile (docs/zero.md lists",
    ):
        assert part in message
    assert "comms_logger" not in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"gradient_cliping": 0.1}, "gradient_cliping (did you mean gradient_clipping?)"),
        ({"zero_optimisation": {"stage": 2}}, "zero_optimisation (did you mean zero_optimization?)"),
        ({"overlap_comm": True}, "overlap_comm (did you mean zero_optimization.overlap_comm?)"),
        (
            {"zero_optimization": {"overlap_com": True}},
            "zero_optimization.overlap_com (did you mean zero_optimization.overlap_comm?)",
        ),
        (
            {"zero_optimization": {"offload_param": {"devise": "cpu"}}},
            "zero_optimization.offload_param.devise (did you mean zero_optimization.offload_param.device?)",
        ),
        ({"comms_logger": {"enable": True}}, "comms_logger.enable (did you mean comms_logger.enabled?)"),
        ({"zero_optimization": {"wall_clock": True}}, "zero_optimization.wall_clock (docs/zero.md lists what"),
    ],
)
def test_a_misspelt_or_misplaced_key_is_refused_with_what_was_meant(tmp_path, content, message):
    with pytest.raises(InputError) as error:
        with_json(tmp_path, content, zero_stage=3)
    assert str(error.value).startswith(f"{tmp_path / 'ds.json'}: must not set {message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ('{"steps_per_print": 1, "steps_per_print": 2}', "steps_per_print"),
        ('{"zero_optimization": {"overlap_comm": true, "overlap_comm": false}}', "overlap_comm"),
    ],
)
def test_a_key_that_is_set_twice_is_refused(tmp_path, content, key):
    """JSON readers take the last without a word."""
    with pytest.raises(InputError, match=f"ds.json: sets {key} twice in one object; keep one"):
        with_json(tmp_path, content)


@pytest.mark.parametrize("part", ["offload_optimizer", "offload_param"])
def test_offloading_to_nvme_is_refused(tmp_path, part):
    zero = {part: {"device": "nvme", "nvme_path": "/local"}}
    with pytest.raises(InputError, match=f"must not set zero_optimization.{part}.device to nvme .* cpu") as error:
        with_json(tmp_path, {"zero_optimization": zero, "aio": {}}, zero_stage=3)
    for name in (f"zero_optimization.{part}.nvme_path (docs/zero.md", "; aio (docs/zero.md"):
        assert name in str(error.value)


def test_deepspeed_knows_every_key_that_may_be_set():
    """None is misspelt or of another version; the memory estimate reads the stage-3 names."""
    zero = DeepSpeedZeroConfig.model_fields
    names = {field.alias or name for name, field in zero.items()}
    assert ALLOWED["zero_optimization."].keys() < names
    for part, known in (("optimizer", DeepSpeedZeroOffloadOptimizerConfig), ("param", DeepSpeedZeroOffloadParamConfig)):
        assert ALLOWED[f"zero_optimization.offload_{part}."].keys() < set(known.model_fields)
    assert ALLOWED["comms_logger."].keys() == set(CommsLoggerConfig.model_fields)


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "deepspeed").glob("*.json")), ids=lambda path: path.name)
def test_shipped_files_are_accepted(path):
    deepspeed_config(section(deepspeed_config=str(path)), 1)


def test_every_key_that_may_be_set_is_documented():
    documentation = (ROOT / "docs" / "zero.md").read_text()
    assert [key for keys in ALLOWED.values() for key in keys if f"`{key}`" not in documentation] == []


def test_no_timer_waits_for_the_device():
    assert not get_timers_config(deepspeed_config(section(), 1)).enabled


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
        (
            {"zero_optimization": {"offload_param": "cpu"}},
            'ds.json: zero_optimization.offload_param must be an object, not "cpu"',
        ),
        ({"zero_optimization": None}, "ds.json: zero_optimization must be an object, not null"),
        ({"zero_optimization": {"reduce_bucket_size": "big"}}, "reduce_bucket_size must be a whole number, 0 or more"),
        ({"zero_optimization": {"overlap_comm": 1}}, "zero_optimization.overlap_comm must be true or false, not 1"),
        ({"zero_optimization": {"offload_param": {"device": "cuda"}}}, "offload_param.device must be none or cpu"),
        ({"communication_data_type": "int8"}, 'communication_data_type must be fp32 or bf16 or fp16, not "int8"'),
        ({"steps_per_print": True}, "steps_per_print must be a whole number, 0 or more, not true"),
    ],
)
def test_broken_json(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        with_json(tmp_path, content)


def test_absent_json(tmp_path):
    with pytest.raises(InputError, match=r"train\.deepspeed_config: .*absent\.json: no such file"):
        deepspeed_config(section(deepspeed_config=str(tmp_path / "absent.json")), 1)
