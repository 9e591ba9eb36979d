"""Losses and gradients that are not finite, at chosen updates on one rank."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import torch

from megatron_sas.core import distributed
from megatron_sas.objective.pretraining import MaskedLMWithTerms
from megatron_sas.train.step import Engine


class _InfiniteGradient(torch.autograd.Function):
    """The same value with an infinite gradient, as an overflow in backward gives."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")


def _poison(parts, how):
    if how == "gradient":
        return replace(parts, loss=_InfiniteGradient.apply(parts.loss))
    if how == "finite gradient":  # an infinite loss of which backward sees nothing
        return replace(parts, loss=parts.loss + float("inf"), mlm_sum=parts.mlm_sum + float("inf"))
    bad = float(how)  # "nan", "inf"
    return replace(parts, loss=parts.loss * bad, mlm_sum=parts.mlm_sum * bad)


@contextlib.contextmanager
def poisoned(updates: list[int], how: str = "nan", rank: int = 0) -> Iterator[None]:
    """Spoil the last micro-batch of the given updates (counted from 1) on `rank` alone."""
    update, forward = Engine.update, MaskedLMWithTerms.forward
    left = 0

    def note(self, window, *arguments):
        nonlocal left
        left = len(window.micro_batches) if window.step + 1 in updates and distributed.rank() == rank else 0
        return update(self, window, *arguments)

    def spoil(self, *arguments, **options):
        nonlocal left
        parts = forward(self, *arguments, **options)
        left -= 1
        return _poison(parts, how) if left == 0 else parts

    with mock.patch.object(Engine, "update", note), mock.patch.object(MaskedLMWithTerms, "forward", spoil):
        yield
