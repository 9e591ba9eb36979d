"""DeepSpeed's JSON configuration, derived from ours plus what a user's JSON may add."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_sas.cli import InputError
from megatron_sas.config_sections import TrainSection

OWNED = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "gradient_clipping": "train.grad_clip",
    "bf16": "train.precision",
    "bfloat16": "train.precision",
    "fp16": "train.precision",
    "amp": "train.precision",
    "torch_autocast": "train.precision",
    "data_types": "train.precision",
    "optimizer": "train.learning_rate and its neighbours",
    "scheduler": "train.warmup_steps and train.decay_horizon",
    "elasticity": "train.global_batch_size and train.micro_batch_size",
}
"""Keys of the JSON that the YAML decides."""

OUTSIDE = "it writes outside of the run's directory, which has its own records"

FIXED = {
    "prescale_gradients": "the loss is already normalised over the global batch",
    "gradient_predivide_factor": "the loss is already normalised over the global batch",
    "zero_allow_untested_optimizer": "the optimizer is torch's AdamW",
    "zero_force_ds_cpu_optimizer": "the optimizer is torch's AdamW",
    "tensorboard": OUTSIDE,
    "csv_monitor": OUTSIDE,
    "wandb": OUTSIDE,
    "comet": OUTSIDE,
}
"""Keys of the JSON that nobody can choose, and why."""


def deepspeed_config(train: TrainSection, world_size: int) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`.

    bf16 with ZeRO stage 0 means fp32 parameters under torch.autocast, since DeepSpeed's own stage-0 bf16 accumulates
    gradients in bf16; stages 1 to 3 keep bf16 parameters, fp32 master weights and fp32 gradient accumulation.

    Raises:
        InputError: the batch does not divide among the processes, or the user's JSON sets what the YAML owns.
    """
    config = {} if train.deepspeed_config is None else _read_json(train.deepspeed_config)
    zero = config.setdefault("zero_optimization", {})
    if not isinstance(zero, dict):
        raise InputError(f"{train.deepspeed_config}: zero_optimization must be an object, not {zero!r}")
    faults = [f"{key} (set {OWNED[key]} in the YAML instead)" for key in config if key in OWNED]
    faults += [f"{key} ({FIXED[key]}; remove it)" for key in config if key in FIXED]
    if "stage" in zero:
        faults.append("zero_optimization.stage (set train.zero_stage in the YAML instead)")
    if faults:
        raise InputError(f"{train.deepspeed_config}: must not set " + "; ".join(faults))
    per_round = train.micro_batch_size * world_size
    if train.global_batch_size % per_round:
        raise InputError(
            f"train.global_batch_size: {train.global_batch_size} is not a multiple of micro_batch_size "
            f"{train.micro_batch_size} × {world_size} processes"
        )
    zero["stage"] = train.zero_stage
    sharded_bf16 = train.precision == "bf16" and train.zero_stage > 0
    config.update(
        train_batch_size=train.global_batch_size,
        train_micro_batch_size_per_gpu=train.micro_batch_size,
        gradient_accumulation_steps=train.global_batch_size // per_round,
        # Stage 0 clips in `Engine`, because DeepSpeed does not tell the norm there.
        gradient_clipping=train.grad_clip if train.zero_stage > 0 else 0.0,
        # Otherwise stage 1 adds the bf16 gradients of earlier micro-batches again at each later one (0.19.8).
        # `Engine` skips updates that are not finite, without the host's waiting for the device as this check does.
        bf16={"enabled": sharded_bf16, "immediate_grad_update": True, "check_grad_overflow": False},
        zero_allow_untested_optimizer=True,
        zero_force_ds_cpu_optimizer=False,
    )
    config.setdefault("steps_per_print", None)
    if sharded_bf16:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def _read_json(path: str) -> dict[str, Any]:
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"train.deepspeed_config: {path}: no such file") from None
    except ValueError as error:
        raise InputError(f"{path}: is not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: must hold a JSON object")
    return config
