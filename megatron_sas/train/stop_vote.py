"""Requests to stop, which reach any rank at any time, as decisions that all ranks take at the same place."""

from __future__ import annotations

import torch

from megatron_sas.core import distributed
from megatron_sas.run.directory import RunDirectory
from megatron_sas.run.signals import StopRequest
from megatron_sas.train.collaborator import Collaborator


class Stopped(Exception):
    """Raised on every rank to abandon an evaluation when the run is asked to stop."""


class StopVote(Collaborator):
    """`stopping` becomes true on all ranks at once when any of them was asked to stop."""

    def __init__(self, request: StopRequest, run: RunDirectory, device: torch.device) -> None:
        self.request, self.run, self.device = request, run, device
        self.stopping = False

    def flags(self) -> tuple[int, ...]:
        """Whether this rank was asked; rank 0 also looks for the file `stop`."""
        if distributed.is_main():
            self.request.look_for_file(self.run)
        return (int(self.request.reason is not None),)

    def react(self, *sums: int) -> None:
        """Stop after this update if any rank was asked."""
        self.stopping = sums[0] > 0

    def decide(self) -> bool:
        """Ask all ranks now. A collective."""
        self.stopping = int(distributed.all_reduce_sum_(torch.tensor(self.flags(), device=self.device))) > 0
        return self.stopping

    def check(self) -> None:
        """Raise `Stopped` on all ranks if any was asked. A collective, called between the forwards of an evaluation."""
        if self.decide():
            raise Stopped

    def reason(self) -> str:
        """Why the run stops: what the lowest rank that was asked says. A collective."""
        return next(reason for reason in distributed.gather_objects(self.request.reason) if reason is not None)
