"""The section `train` of a configuration."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_serializer, field_validator
from pydantic_core import PydanticCustomError

from megatron_sas.core.settings import Section
from megatron_sas.optim.optimizers import OPTIMIZERS
from megatron_sas.optim.schedules import MAPPED, AnySchedule, Stages, check_kind

NEIGHBOURS = {"value": "learning_rate", "warmup_steps": "warmup_steps", "decay_horizon": "decay_horizon"}
"""What a schedule of the learning rate takes from fields next to it, by its own names."""


class TrainSection(Section):
    """Optimization. Gradient accumulation is derived: global_batch_size / (micro_batch_size × processes)."""

    steps: int = Field(description="updates", ge=1)
    global_batch_size: int = Field(256, description="sequences per update", ge=1)
    micro_batch_size: int = Field(description="sequences per forward on one device", ge=1)
    precision: Literal["fp32", "bf16"] = Field("bf16", description="arithmetic of the model; weights are kept in fp32")
    learning_rate: float = Field(1e-4, description="peak", gt=0, le=1e3)
    warmup_steps: int = Field(10_000, description="linear warm-up", ge=0)
    decay_horizon: int = Field(1_000_000, description="step at which the decay would reach 0", ge=1)
    schedule: AnySchedule = Field(
        "linear",
        description=f"learning rate by completed updates: {', '.join(MAPPED)}, {{kind: wsd, decay_steps: N}} (default: "
        "a tenth of decay_horizon), or stages of rates",
        validate_default=True,
    )
    optimizer: Literal[*OPTIMIZERS] = Field("adamw", description="what makes updates of gradients")
    weight_decay: float = Field(0.0, description="decoupled, not on biases and LayerNorms", ge=0)
    adam_betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW")
    adam_eps: float = Field(1e-8, description="AdamW", ge=1e-30)  # smaller ones vanish in float32
    grad_clip: float = Field(1.0, description="largest global gradient norm; 0: no clipping", ge=0)
    compile: bool | None = Field(None, description="torch.compile, not with ZeRO stage 3; default: on GPUs")
    deterministic: bool = Field(
        False, description="on GPUs: fixed kernels, so that a run repeated or resumed there has the same bits; slower"
    )
    max_nonfinite_updates: int = Field(
        10, description="updates with NaN or infinity are skipped; so many in a row end the run", ge=1
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(0, description="DeepSpeed ZeRO: what is sharded over processes")
    deepspeed_config: str | None = Field(None, description="DeepSpeed JSON for what this file does not own")

    @field_validator("schedule", mode="before")
    @classmethod
    def _complete(cls, value: Any, info: ValidationInfo) -> Any:
        """A name or a mapping leaves the peak, the warm-up and the horizon to their own fields."""
        if isinstance(value, str):
            value = {"kind": value}
        if not isinstance(value, dict):
            return value
        check_kind(value.get("kind"))
        if twice := value.keys() & NEIGHBOURS.keys():
            fields = " and ".join(f"train.{NEIGHBOURS[name]}" for name in sorted(twice))
            raise PydanticCustomError("given_twice", f"should leave {', '.join(sorted(twice))} to {fields}")
        return value | {name: info.data.get(field, 1) for name, field in NEIGHBOURS.items()}

    @field_serializer("schedule")
    def _own_options(self, schedule: AnySchedule) -> Any:
        if isinstance(schedule, Stages):
            return schedule.model_dump()
        options = {name: value for name, value in asdict(schedule).items() if name not in NEIGHBOURS}
        own = {name: value for name, value in options.items() if value is not None}
        return own["kind"] if len(own) == 1 else own

    def compiles(self, device_type: str) -> bool:
        """Whether the model's parts are compiled on such a device."""
        if self.compile is None:
            return device_type == "cuda" and self.zero_stage < 3
        return self.compile

    def faults(self) -> list[str]:
        """Batch sizes must divide, and the run must end before the learning rate does."""
        faults = []
        if self.global_batch_size % self.micro_batch_size:
            faults.append(
                f"global_batch_size: {self.global_batch_size} is not a multiple of micro_batch_size "
                f"{self.micro_batch_size}"
            )
        faults += self._schedule_faults()
        if reason := OPTIMIZERS[self.optimizer].unsupported_reason(self.zero_stage):
            faults.append(f"optimizer: {self.optimizer}: {reason}")
        if self.compile and self.zero_stage == 3:
            faults.append(
                "compile: ZeRO stage 3 gathers weights inside the layers; set compile: false or zero_stage: 2"
            )
        end = self.schedule.end
        if end is not None and self.steps > end:
            where = "the end of schedule's stages" if isinstance(self.schedule, Stages) else "decay_horizon"
            faults.append(f"steps: {self.steps} is beyond {where} {end}, where lr reaches 0")
        if not all(0 <= beta < 1 for beta in self.adam_betas):
            faults.append(f"adam_betas: {list(self.adam_betas)} must be at least 0 and less than 1")
        return faults

    def _schedule_faults(self) -> list[str]:
        """Of the schedule of the learning rate, which begin with the field that is wrong."""
        if not isinstance(self.schedule, Stages):
            return self.schedule.faults()
        faults = [f"schedule: {fault}" for fault in self.schedule.faults()]
        values = [value for stage in self.schedule.root for value in (stage.value, stage.end_value or 0.0)]
        return faults + (["schedule: a learning rate must not be negative"] if min(values, default=0.0) < 0 else [])
