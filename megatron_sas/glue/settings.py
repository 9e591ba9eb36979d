"""How to fine-tune on GLUE, and what results are called; imported before torch is needed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_sas.core.cli import InputError

FORMAT = "megatron_sas glue"


@dataclass(frozen=True)
class Settings:
    """How to fine-tune; the defaults are those that transformers' examples use for GLUE, with a warm-up."""

    learning_rate: float = 2e-5
    batch_size: int = 32
    epochs: int = 3
    max_length: int = 128
    warmup_share: float = 0.1
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    precision: str = "fp32"

    def __post_init__(self) -> None:
        for name in ("learning_rate", "batch_size", "epochs", "max_length", "grad_clip"):
            if not getattr(self, name) > 0:
                raise InputError(f"--{name.replace('_', '-')}: {getattr(self, name)} is not above 0")
        if not 0 <= self.warmup_share < 1:
            raise InputError(f"--warmup-share: {self.warmup_share} is not a share from 0 to below 1")
        if self.weight_decay < 0:
            raise InputError(f"--weight-decay: {self.weight_decay} is below 0")

    def rate(self, step: int, steps: int) -> float:
        """The factor of the learning rate for update `step` of `steps`, both from 0: linear warm-up, linear decay."""
        warmup = math.ceil(self.warmup_share * steps)
        return step / warmup if step < warmup else (steps - step) / max(1, steps - warmup)
