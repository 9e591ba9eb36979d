"""Updates whose loss or gradient is not finite: counted, reported, and the end of the run after too many in a row.

That such an update changes nothing is the engine's doing, on the device, when it happens. Here the host learns of it,
when the records are read off the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from megatron_sas.core.cli import InputError


@dataclass
class SkippedUpdates:
    """The counters, the same on every rank and part of a checkpoint's state."""

    limit: int  # how many in a row end the run
    total: int = 0
    in_a_row: int = 0

    def count(self, grad_norm: float) -> bool:
        """Count one update, in order; True when it was skipped."""
        skipped = not math.isfinite(grad_norm)
        self.total += skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        return skipped

    @property
    def at_limit(self) -> bool:
        """Whether so many were skipped in a row that the run must end."""
        return self.in_a_row >= self.limit

    def refuse(self, step: int) -> None:
        """Raise `InputError`: the updates up to `step` were skipped in a row."""
        raise InputError(
            f"updates {step - self.in_a_row + 1:,} to {step:,} were all skipped, because loss or gradient was NaN or "
            f"infinite (train.max_nonfinite_updates: {self.limit}); the newest checkpoint is from before. The events "
            "skipped_update in metrics.jsonl name the samples; if the data is sound, start a new run with a smaller "
            "learning rate or a longer warm-up"
        )

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"total": self.total, "in_a_row": self.in_a_row}
