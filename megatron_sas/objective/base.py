"""What a term of the objective is: loss = MLM + Σ λ(step) · R over terms, each with a schedule and metrics of its own.

B sequences, S tokens, H heads. To add a term, write it in one file and add a line to `TERMS` (`terms.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from pydantic import Field
from torch import Tensor

from megatron_sas.core.settings import Section
from megatron_sas.data.mlm_dataset import IGNORED
from megatron_sas.model.base import ModelOutput
from megatron_sas.optim.schedules import ANY_KIND, AnySchedule, Stages, schedule_faults

EDGES, QUERIES_KEYS = "edges", "queries_keys"
"""What a term may need of the model: probabilities along its edges; queries and keys of every layer."""


class TermSection(Section):
    """The settings that every term has."""

    schedule: AnySchedule = Field(
        Stages(()),
        description="λ by completed updates: a number, stages {start, end, value[, end_value]}, or {kind: "
        f"{ANY_KIND}, value, warmup_steps, decay_horizon[, decay_steps]}}; default 0",
    )

    def faults(self) -> list[str]:
        """The schedule must be sound."""
        return schedule_faults(self.schedule)


@dataclass(frozen=True)
class Batch:
    """One micro-batch on the device, as far as terms may look at it; all int64."""

    input_ids: Tensor  # (B, S), masked
    masked_positions: Tensor  # (M,) flat indices into B·S; 0 where it is filled up
    labels: Tensor  # (M,) original tokens there; -100 where it is filled up
    heads: Tensor  # (B, S) dependency heads, -1 where there is none

    def holds_text(self, special_ids: Sequence[int]) -> Tensor:
        """bool `(B, S)`: where the text has none of these tokens; what masking put in its place does not matter."""
        ids = self.input_ids
        masked = torch.zeros(ids.numel(), dtype=torch.int32, device=ids.device)
        masked.index_add_(0, self.masked_positions, (self.labels != IGNORED).to(torch.int32))
        special = torch.zeros_like(ids, dtype=torch.bool)
        for number in special_ids:
            special |= ids == number
        return (masked.view_as(ids) > 0) | ~special  # what stands at a masked position is no special token


@dataclass(frozen=True)
class Counts:
    """What a term's sum over an update is divided by."""

    sequences: int  # of the global batch
    micro_batches: float  # of all ranks
    edges: int  # that the term asked for, in the global batch; 0 for a term that needs none


class Term(Protocol):
    """A regularizer R. Made from its section of the configuration and the ids of special tokens, padding first."""

    name: ClassVar[str]  # of its section in the YAML, and prefix of its metrics
    title: ClassVar[str]  # in reports
    section_class: ClassVar[type[TermSection]]
    needs: ClassVar[frozenset[str]]  # what BERT must hand out: EDGES, QUERIES_KEYS, both or nothing
    in_every_run: ClassVar[bool]  # measured also in runs that give it no weight; others are only where they have one
    syntactic: ClassVar[bool]  # it looks at dependency heads, so that λ suppresses or promotes syntax
    reduction: str  # "sequence": R is averaged over the global batch; "sum": summed over each micro-batch

    def __init__(self, section: TermSection, special_ids: Sequence[int] = ()) -> None: ...

    def describe(self) -> str:
        """The settings of R in words."""

    def edges(self, batch: Batch) -> Tensor:
        """Heads `(B, S)` along which BERT must hand out its attention, -1 for none. Called for terms that need EDGES,
        which have `to_head` and `to_dependent` along them in the output that they are called with."""

    def __call__(self, output: ModelOutput, batch: Batch) -> Tensor:
        """R of every sequence, `(B,)`, with gradient. `output` has what the term needs."""

    def metrics(self, total: float, counts: Counts) -> dict[str, float]:
        """The values of a record, R itself by the term's `name`, from the sum of R over an update."""
