"""The base of all sections of a configuration: typed, immutable, and with all of their faults reported at once.

Every section stands next to the code that reads it; `megatron_sas/config.py` puts them together.
"""

from __future__ import annotations

import typing
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

FAULT_SEPARATOR = "\x1f"  # between the faults of one section, which pydantic passes on as one message

PARTLY = {"partly": True}
"""Context of a validation that leaves out what must hold between fields."""


class Section(BaseModel):
    """A part of the configuration: unknown fields are errors, values are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _check_no_truth_value(cls, value: Any, info: ValidationInfo) -> Any:
        """`yes` is no number, though it is one to Python."""
        annotation = cls.model_fields[info.field_name].annotation
        if isinstance(value, bool) and bool not in (annotation, *typing.get_args(annotation)):
            raise PydanticCustomError("truth_value", "input should not be true or false")
        return value

    def faults(self) -> list[str]:
        """What is wrong between the fields of this section; each begins with the field's name."""
        return []

    @model_validator(mode="after")
    def _report_faults(self, info: ValidationInfo) -> Section:
        if info.context != PARTLY and (faults := self.faults()):
            raise ValueError(FAULT_SEPARATOR.join(faults))
        return self


class When(Section):
    """A set of completed updates: step 0, the last, every `every`, and every `dense_every` until `dense_until`."""

    every: int | None = Field(None, description="regular interval in steps; none: only the first and last step", ge=1)
    dense_every: int | None = Field(None, description="interval of the early, dense part", ge=1)
    dense_until: int = Field(0, description="where the dense part ends (included)", ge=0)
    at: tuple[int, ...] = Field((), description="further steps")

    @property
    def names_steps(self) -> bool:
        """Whether any step but the first and the last is asked for."""
        return self.every is not None or self.dense_every is not None or bool(self.at)

    def faults(self) -> list[str]:
        """The dense part needs an interval and an end."""
        if (self.dense_every is None) != (self.dense_until == 0):
            return ["dense_every: needs dense_until, and the other way round"]
        return []

    def due(self, step: int, last_step: int) -> bool:
        """Whether `step` belongs to the set, for a run that ends at `last_step`."""
        return (
            step in (0, last_step)
            or step in self.at
            or (self.every is not None and step % self.every == 0)
            or (self.dense_every is not None and step <= self.dense_until and step % self.dense_every == 0)
        )
