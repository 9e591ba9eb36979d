"""How evaluations run a model: what they ask of it, in evaluation mode, and equally often on every rank."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from megatron_sas.core.distributed import rank, world_size
from megatron_sas.model.base import AttentionObserver, ModelOutput, QueryKeyObserver

Batch = TypeVar("Batch")


class Encoder(Protocol):
    """All that an evaluation asks of a model, which is an `nn.Module`: `MaskedLM`, or another one behind this call.

    The observers give UAS, SAS and the entropy of attention, `masked_positions` pseudo-log-likelihoods and the loss,
    and `hidden` of the output the intrinsic dimension.
    """

    shows_queries: bool
    """Whether `query_key_observer` is called; without, attention is only to be had as maps."""
    no_maps: str | None
    """Why neither observer can be called, in words that fit behind the model's class; None: they can."""

    def __call__(
        self,
        input_ids: Tensor,
        *,
        heads: Tensor | None = None,
        seqlens: Tensor | None = None,
        masked_positions: Tensor | None = None,
        only_at: Tensor | None = None,
        attention_observer: AttentionObserver | None = None,
        query_key_observer: QueryKeyObserver | None = None,
    ) -> ModelOutput:
        """See `MaskedLM.forward`."""


@dataclass(frozen=True)
class TokenBatch:
    """B sequences of S tokens, and which of them are only run because other ranks run some."""

    input_ids: Tensor  # int64 (B, S)
    dep_heads: Tensor  # int64 (B, S), dependency heads, -1 = none
    counts: bool | Tensor = True  # false for the batch, or bool (B,) for its rows, where they do not count
    seqlens: Tensor | None = None  # int64 (B,), valid lengths; None: all of S


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


@contextlib.contextmanager
def after_each_forward(model: torch.nn.Module, call: Callable[[], object]) -> Iterator[None]:
    """Call `call` after every forward pass of `model` in the block; an exception that it raises ends the evaluation."""

    def hook(*_: object) -> None:  # what a hook returns would replace the model's output
        call()

    handle = model.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
