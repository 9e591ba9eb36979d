"""What a term of the objective is: loss = MLM + Σ λ(step) · R over terms, each with a schedule and metrics of its own.

B sequences, S tokens, H heads. To add a term, write it in one file and add a line to `TERMS` (`terms.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from megatron_sas.core.settings import Section
from megatron_sas.model.base import ModelOutput


@dataclass(frozen=True)
class Batch:
    """One micro-batch on the device, as far as terms may look at it; all int64."""

    input_ids: Tensor  # (B, S), masked
    masked_positions: Tensor  # (M,) flat indices into B·S; 0 where it is filled up
    labels: Tensor  # (M,) original tokens there; -100 where it is filled up
    heads: Tensor  # (B, S) dependency heads, -1 where there is none


@dataclass(frozen=True)
class Counts:
    """What a term's sum over an update is divided by."""

    sequences: int  # of the global batch
    micro_batches: float  # of all ranks
    edges: int  # that the term asked for, in the global batch; 0 for a term that asks for none


class Term(Protocol):
    """A regularizer R. Made from its section of the configuration and the ids of special tokens."""

    name: ClassVar[str]  # of its section in the YAML, and prefix of its metrics
    title: ClassVar[str]  # in reports
    section_class: ClassVar[type[Section]]  # has a field `schedule`, λ
    in_every_run: ClassVar[bool]  # measured also in runs that give it no weight; others are only where they have one
    syntactic: ClassVar[bool]  # it looks at dependency heads, so that λ suppresses or promotes syntax
    reduction: str  # "sequence": R is averaged over the global batch; "sum": summed over each micro-batch

    def __init__(self, section: Section, special_ids: Sequence[int] = ()) -> None: ...

    def describe(self) -> str:
        """The settings of R in words."""

    def edges(self, batch: Batch) -> Tensor | None:
        """Heads `(B, S)` along which BERT must hand out its attention, -1 for none; None: it need not."""

    def __call__(self, output: ModelOutput, batch: Batch) -> Tensor:
        """R of every sequence, `(B,)`, with gradient. `output` has the probabilities along the term's own edges."""

    def metrics(self, total: float, counts: Counts) -> dict[str, float]:
        """The values of a record, R itself by the term's `name`, from the sum of R over an update."""
