"""The section `masking`: which share of the tokens training masks, by completed updates, and what becomes of them.

`data/masking.py` masks. Validation does not follow this section: it masks with `data.mask_prob` and BERT's split, so
that losses of runs and steps with other rates can be compared.
"""

from __future__ import annotations

import math

from pydantic import Field

from megatron_sas.core.settings import Section
from megatron_sas.data.masking import BERT_SPLIT
from megatron_sas.optim.schedules import ANY_KIND, AnySchedule, Schedule, Stages, read_schedule, schedule_faults


class MaskingSection(Section):
    """Masked tokens in training; validation always masks data.mask_prob of them, split 0.8, 0.1, 0.1."""

    rate: AnySchedule | None = Field(
        None,
        description="probability with which a token is masked, by completed updates: a number, stages {start, end, "
        f"value[, end_value]}} without a gap, or {{kind: {ANY_KIND}, value, decay_horizon[, decay_steps]}}; "
        "default: data.mask_prob",
    )
    split: tuple[float, float, float] = Field(
        BERT_SPLIT, description="shares of the masked tokens that become [MASK], become a random token, and stay"
    )

    def schedule(self, mask_prob: float) -> Schedule:
        """The rate by completed updates, where `mask_prob` is `data.mask_prob`."""
        return read_schedule(mask_prob) if self.rate is None else self.rate

    def faults(self) -> list[str]:
        """A rate must be a probability at every step, and shares must add up."""
        faults = [] if self.rate is None else schedule_faults(self.rate, "rate") or _rate_faults(self.rate)
        if min(self.split) < 0 or not math.isclose(sum(self.split), 1.0, abs_tol=1e-9):
            shares = ", ".join(f"{share:g}" for share in self.split)
            faults.append(f"split: {shares} add up to {sum(self.split):g}; give three shares of at least 0 that make 1")
        return faults

    def shortage(self, steps: int) -> str | None:
        """Why the rate does not suffice for a run of so many updates; None where it does."""
        end = None if self.rate is None else self.rate.end
        if end is None or steps <= end:
            return None
        return f"rate: is 0 from step {end} on, before the end of train.steps {steps}; lengthen its last part"


def _rate_faults(rate: Schedule) -> list[str]:
    """Where a well-formed schedule is no rate of masking, but for its end."""
    if not isinstance(rate, Stages):
        values = [rate.value]
        faults = ["rate.warmup_steps: a rate cannot begin at 0; leave it out"] if rate.warmup_steps else []
    else:
        stages = sorted(rate.root, key=lambda stage: stage.start)
        values = [v for stage in stages for v in (stage.value, stage.end_value) if v is not None] or [0.0]
        ends = [0, *(stage.end for stage in stages)]
        faults = [
            f"rate: no stage covers steps {end} to {stage.start}; stages of a rate must leave no gap"
            for end, stage in zip(ends, stages, strict=False)
            if end < stage.start
        ]
    wrong = [value for value in values if not 0 < value < 1]
    return [f"rate: {value:g} is not a rate; it must be more than 0 and less than 1" for value in wrong[:1]] + faults
