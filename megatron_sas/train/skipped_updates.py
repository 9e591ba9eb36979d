"""Updates whose loss or gradient is not finite: counted, reported, and the end of the run after too many in a row.

The engine discards such an update on the device. This module counts them on the host once the records are read back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from megatron_sas.core.cli import InputError
from megatron_sas.train.collaborator import Collaborator
from megatron_sas.train.journal import Journal


class SkippedUpdates(Collaborator):
    """The counters, the same on every rank."""

    def __init__(
        self, limit: int, journal: Journal, samples: Callable[[int], list[int]], before_the_end: Callable[[], None]
    ) -> None:
        """Count from zero.

        Args:
            limit: how many in a row end the run.
            samples: the ids of the samples of the update that makes a given step.
            before_the_end: called before the run ends.
        """
        self.limit, self.journal, self.samples, self.before_the_end = limit, journal, samples, before_the_end
        self.total = self.in_a_row = 0

    def look(self, step: int, values: dict[str, Any]) -> None:
        """Look at the record of one update, in order.

        Raises:
            InputError: `limit` updates were skipped in a row.
        """
        skipped = not math.isfinite(values["grad_norm"])
        self.total += skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        if not skipped:
            return
        self.journal.event(step, event="skipped_update", total=self.total, samples=self.samples(step))
        loss, norm = values["mlm_loss"], values["grad_norm"]
        self.journal.log(f"step {step}: update skipped (loss {loss:.4f}, gradient norm {norm:g})")
        if self.in_a_row >= self.limit:
            self.before_the_end()
            raise InputError(
                f"updates {step - self.in_a_row + 1:,} to {step:,} were all skipped, because loss or gradient was NaN "
                f"or infinite (train.max_nonfinite_updates: {self.limit}); the newest checkpoint is from before. The "
                "events skipped_update in metrics.jsonl name the samples; if the data is sound, start a new run with "
                "a smaller learning rate or a longer warm-up"
            )

    def state_dict(self) -> dict[str, Any]:
        """The counters."""
        return {"skipped": {"total": self.total, "in_a_row": self.in_a_row}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting."""
        counters = state.get("skipped", {})
        self.total, self.in_a_row = counters.get("total", 0), counters.get("in_a_row", 0)
