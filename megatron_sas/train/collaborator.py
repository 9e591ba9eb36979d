"""What the training loop moves besides the engine: each collaborator does one thing after updates."""

from __future__ import annotations

from typing import Any


class Collaborator:
    """Its methods are called on all ranks, in the order of `Trainer.collaborators`. By default they do nothing."""

    def flags(self) -> tuple[int, ...]:
        """Small numbers that are summed over the ranks in the update's own all-reduce."""
        return ()

    def react(self, *sums: int) -> None:
        """Take note of the sums of `flags`."""

    def begin(self, step: int, resumed: bool) -> None:
        """Do what is due before the first update of this start; a resumed run has a checkpoint of `step`."""

    def after_update(self, step: int) -> None:
        """Do what is due after `step` updates."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep; JSON types, under keys that no other collaborator uses."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned, from the state of a checkpoint of any version, or of a new run."""
