"""DeepSpeed's JSON configuration, derived from ours plus what a user's JSON may add."""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_sas.core.cli import InputError
from megatron_sas.optim.section import TrainSection

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
    "optimizer": "train.optimizer and its neighbours",
    "scheduler": "train.warmup_steps and train.decay_horizon",
    "elasticity": "train.global_batch_size and train.micro_batch_size",
    "zero_optimization.stage": "train.zero_stage",
}
"""Keys of the JSON that the YAML decides."""

OUTSIDE = "it writes outside of the run's directory, which has its own records"

FIXED = {
    "prescale_gradients": "the loss is already normalised over the global batch",
    "gradient_predivide_factor": "the loss is already normalised over the global batch",
    "zero_allow_untested_optimizer": "the optimizer is the program's own (train.optimizer)",
    "zero_force_ds_cpu_optimizer": "the optimizer is the program's own (train.optimizer)",
    "tensorboard": OUTSIDE,
    "csv_monitor": OUTSIDE,
    "wandb": OUTSIDE,
    "comet": OUTSIDE,
    "flops_profiler": OUTSIDE,
    "timers": "they make the host wait for the device at every micro-batch",
    "managed_gradient_accumulation": "the program relies on DeepSpeed's counting of micro-batches",
}
"""Keys of the JSON that nobody can choose, and why."""


def _is_size(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0 and float(value).is_integer()


DATA_TYPES = ("fp32", "bf16", "fp16")
KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "switch": ("true or false", lambda value: isinstance(value, bool)),
    "switch or null": ("true or false", lambda value: value is None or isinstance(value, bool)),
    "size": ("a whole number, 0 or more", _is_size),
    "size or null": ("a whole number, 0 or more", lambda value: value is None or _is_size(value)),
    "object": ("an object", lambda value: isinstance(value, dict)),
    "object or null": ("an object", lambda value: value is None or isinstance(value, dict)),
    "list": ("a list", lambda value: isinstance(value, list)),
    "data type": (" or ".join(DATA_TYPES), lambda value: value is None or value in DATA_TYPES),
    "device": ("none or cpu", lambda value: value in ("none", "cpu")),
}
"""Kinds of values of the JSON: in words, and as a test."""

_OFFLOAD = {"device": "device", "switch": "pin_memory"}
_ALLOWED = {
    "": {
        "object": "zero_optimization comms_logger",
        "data type": "communication_data_type",
        "switch": "wall_clock_breakdown memory_breakdown",
        "size or null": "steps_per_print",
    },
    "zero_optimization.": {
        "switch": "contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce allgather_partitions "
        "round_robin_gradients stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential "
        "memory_efficient_linear log_trace_cache_warnings enable_sanity_checks",
        "switch or null": "overlap_comm",
        "size": "reduce_bucket_size allgather_bucket_size sub_group_size stage3_prefetch_bucket_size "
        "stage3_param_persistence_threshold stage3_model_persistence_threshold stage3_max_live_parameters "
        "stage3_max_reuse_distance stage3_module_granularity_threshold",
        "object or null": "offload_optimizer offload_param",
    },
    "zero_optimization.offload_optimizer.": _OFFLOAD,
    "zero_optimization.offload_param.": _OFFLOAD,
    "comms_logger.": {"switch": "enabled prof_all verbose debug", "list": "prof_ops"},
}
ALLOWED = {
    prefix: {name: kind for kind, names in kinds.items() for name in names.split()}
    for prefix, kinds in _ALLOWED.items()
}
"""Keys of the JSON, by the object that they are in, that change speed and memory but not what is trained, and the kinds
of their values.

The names are those of DeepSpeed 0.19.8. The rest writes files, does nothing here, or trains something else unnoticed.
"""


def deepspeed_config(train: TrainSection, world_size: int) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`.

    bf16 with ZeRO stage 0 means fp32 parameters under torch.autocast, since DeepSpeed's own stage-0 bf16 accumulates
    gradients in bf16; stages 1 to 3 keep bf16 parameters, fp32 master weights and fp32 gradient accumulation.

    Raises:
        InputError: the batch does not divide among the processes, or the user's JSON sets what it must not.
    """
    config = {} if train.deepspeed_config is None else _read_json(train.deepspeed_config)
    faults = _faults(config, "", str(train.deepspeed_config))
    if faults:
        raise InputError(f"{train.deepspeed_config}: must not set " + "; ".join(faults))
    per_round = train.micro_batch_size * world_size
    if train.global_batch_size % per_round:
        raise InputError(
            f"train.global_batch_size: {train.global_batch_size} is not a multiple of micro_batch_size "
            f"{train.micro_batch_size} × {world_size} processes"
        )
    zero = config.setdefault("zero_optimization", {})
    zero["stage"] = train.zero_stage
    sharded_bf16 = train.precision == "bf16" and train.zero_stage > 0
    config.update(
        train_batch_size=train.global_batch_size,
        train_micro_batch_size_per_gpu=train.micro_batch_size,
        gradient_accumulation_steps=train.global_batch_size // per_round,
        # Without this key DeepSpeed clips at 1.0. Stage 0 clips in `Engine`: DeepSpeed does not give the norm there.
        gradient_clipping=train.grad_clip if train.zero_stage > 0 else 0.0,
        # Otherwise stage 1 adds the bf16 gradients of earlier micro-batches again at each later one (0.19.8).
        # `Engine` skips updates that are not finite, without the host's waiting for the device as this check does.
        bf16={"enabled": sharded_bf16, "immediate_grad_update": True, "check_grad_overflow": False},
        zero_allow_untested_optimizer=True,
        zero_force_ds_cpu_optimizer=False,
        timers={"throughput": {"enabled": False}},  # synchronises host and device twice per micro-batch
    )
    config.setdefault("steps_per_print", None)
    if sharded_bf16:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def _faults(section: dict[str, Any], prefix: str, path: str) -> list[str]:
    """What the object at `prefix` of the user's JSON must not set, each with the remedy."""
    faults, unknown = [], []
    for key, value in section.items():
        name = prefix + key
        if name in OWNED:
            faults.append(f"{name} (set {OWNED[name]} in the YAML instead)")
        elif name in FIXED:
            faults.append(f"{name} ({FIXED[name]}; remove it)")
        elif (key, value) == ("device", "nvme"):  # AdamW's state, swapped out, could be neither created nor saved
            faults.append(f"{name} to nvme (checkpoints need everything in memory; choose cpu)")
        elif key not in ALLOWED[prefix]:
            if meant := _meant(key, prefix):
                faults.append(f"{name} (did you mean {meant}?)")
            else:
                unknown.append(name)
        elif not KINDS[ALLOWED[prefix][key]][1](value):
            raise InputError(f"{path}: {name} must be {KINDS[ALLOWED[prefix][key]][0]}, not {json.dumps(value)}")
        elif isinstance(value, dict):
            faults += _faults(value, f"{name}.", path)
    if unknown:
        faults.append(f"{', '.join(unknown)} (docs/zero.md lists what may be set; remove the rest)")
    return faults


def _meant(key: str, prefix: str) -> str | None:
    """The name that an unknown key of the object at `prefix` misspells, or has in another object; None: neither.

    DeepSpeed 0.19.8 ignores such keys at the top level.
    """
    known = [outer + inner for outer, keys in ALLOWED.items() for inner in keys] + [*OWNED, *FIXED]
    here = {name.removeprefix(prefix) for name in known if name.startswith(prefix)}
    close = [prefix + other for other in difflib.get_close_matches(key, here, n=1, cutoff=0.8)]
    elsewhere = [name for name in known if name.rpartition(".")[2] == key]
    return next(iter(close + elsewhere), None)


def _read_json(path: str) -> dict[str, Any]:
    def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if twice := sorted(key for key, count in Counter(key for key, _ in pairs).items() if count > 1):
            raise InputError(f"{path}: sets {', '.join(twice)} twice in one object; keep one")
        return dict(pairs)

    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=object_of)
    except FileNotFoundError:
        raise InputError(f"train.deepspeed_config: {path}: no such file") from None
    except ValueError as error:
        raise InputError(f"{path}: is not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: must hold a JSON object")
    return config
