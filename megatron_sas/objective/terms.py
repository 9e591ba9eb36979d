"""The terms that there are, and what is done with those of a run, however many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron_sas.core.settings import Section
from megatron_sas.model.base import ModelOutput
from megatron_sas.objective.base import EDGES, QUERIES_KEYS, Batch, Term
from megatron_sas.objective.entropy import EntropyTerm
from megatron_sas.objective.offset import OffsetTerm
from megatron_sas.objective.sas import SasTerm
from megatron_sas.optim.schedules import Stages

T = TypeVar("T")

TERMS: dict[str, type[Term]] = {
    "sas": SasTerm,
    "offset": OffsetTerm,
    "entropy": EntropyTerm,
}


def is_in_run(name: str, section: Section) -> bool:
    """Whether a run with this section has the term at all."""
    return TERMS[name].in_every_run or section.schedule != Stages(())


def syntactic_first(of_terms: Mapping[str, T]) -> tuple[T, list[T]]:
    """What belongs to the term along dependency heads, and what to the others."""
    syntactic = next(name for name, term in TERMS.items() if term.syntactic)
    return of_terms[syntactic], [value for name, value in of_terms.items() if name != syntactic]


def make_terms(sections: Mapping[str, Section], special_ids: Sequence[int] = ()) -> dict[str, Term]:
    """The terms of a run, from their sections, in the order of `TERMS`."""
    return {name: TERMS[name](sections[name], special_ids) for name in TERMS if is_in_run(name, sections[name])}


def weights(terms: Mapping[str, Term], step: int) -> dict[str, float]:
    """λ of every term for the update that follows `step` completed ones."""
    return {name: term.section.schedule(step) for name, term in terms.items()}


def number_needing(what: str, terms: Mapping[str, Term]) -> int:
    """How many of the terms need EDGES, or QUERIES_KEYS, of BERT."""
    return sum(what in term.needs for term in terms.values())


class Needs:
    """What several terms need of BERT for a batch, as arguments for it."""

    def __init__(self, terms: Mapping[str, Term], batch: Batch) -> None:
        self.edges = {name: term.edges(batch) for name, term in terms.items() if EDGES in term.needs}  # (B, S)
        self._queries_keys = number_needing(QUERIES_KEYS, terms) > 0

    @property
    def heads(self) -> Tensor | None:
        """`(B, S)` for one set, `(B, sets, S)` for several, None for none."""
        sets = list(self.edges.values())
        return (sets[0] if len(sets) == 1 else torch.stack(sets, 1)) if sets else None

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the model."""
        return {"heads": self.heads} | ({"queries_keys": True} if self._queries_keys else {})

    def output_for(self, name: str, output: ModelOutput) -> ModelOutput:
        """What the model returned for `arguments`, with the probabilities along the edges of one term."""
        if name not in self.edges or len(self.edges) == 1:
            return output
        return output.select(list(self.edges).index(name))
