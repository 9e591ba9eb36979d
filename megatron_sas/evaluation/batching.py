"""How every evaluation feeds a model: evaluation mode, and the same number of forward passes on every rank."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from megatron_sas.core.distributed import rank, world_size

Batch = TypeVar("Batch")
AfterBatch = Callable[[], None]  # called once after each forward pass, equally often on every rank


def shard_batches(
    batches: Sequence[Batch], this_rank: int | None = None, ranks: int | None = None
) -> list[tuple[Batch, bool]]:
    """The batches of one rank as (batch, counts) pairs, equally many on every rank.

    Batches are dealt in turn, so that ranks get batches of similar size from a sorted list. A rank for which none is
    left repeats the first batch with `counts` false: under ZeRO-3 a forward pass is a collective, and a rank that
    skips one would hang the others.
    """
    this_rank = rank() if this_rank is None else this_rank
    ranks = world_size() if ranks is None else ranks
    mine = [(batch, True) for batch in batches[this_rank::ranks]]
    rounds = -(-len(batches) // ranks)
    return mine + [(batches[0], False)] * (rounds - len(mine))


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[torch.device]:
    """Evaluation mode without gradients for the block; yields the device that inputs must be on.

    `torch.no_grad`, not `inference_mode`: parameters that ZeRO-3 gathers inside the block are used in training
    afterwards.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        model.train(was_training)
