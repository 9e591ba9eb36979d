"""Attention to the token at a fixed distance, in all sequences, parsed or not.

The edges are i → i + distance between word pieces of one sequence. Special tokens and padding are neither end of any;
masked tokens are as good as others. Sentence boundaries do not matter, since the model does not see them. R is that of
`along_edges.py`. For `sas` on dependency heads that are shifted, a control with as many edges as the parses have, see
`tools/make_control.py`.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from megatron_sas.objective.along_edges import EdgeSection, EdgeTerm
from megatron_sas.objective.base import Batch


class OffsetSection(EdgeSection):
    """Attention to the token at a fixed distance, in all sequences: loss = MLM + λ·R; default: no part of the run."""

    distance: int = Field(1, description="of the token attended to, in word pieces; negative: to the left")

    def faults(self) -> list[str]:
        """A token's attention to itself is no edge."""
        return super().faults() + (["distance: must not be 0"] if self.distance == 0 else [])


class OffsetTerm(EdgeTerm):
    """Attention along i → i + distance."""

    name, title, section_class = "offset", "offset term", OffsetSection
    in_every_run = syntactic = False

    def describe(self) -> str:
        """The distance, and the settings of R."""
        return f"distance {self.section.distance}, {super().describe()}"

    def edges(self, batch: Batch) -> Tensor:
        """int64 `(B, S)`: i + distance, -1 where that is outside of the sequence or either end is special."""
        ordinary = batch.holds_text(self.special_ids)  # (B, S)
        seq = ordinary.shape[1]
        other = torch.arange(seq, device=ordinary.device) + self.section.distance  # (S,)
        inside = (other >= 0) & (other < seq)
        edge = ordinary & inside & ordinary[:, other.clamp(0, seq - 1)]
        return torch.where(edge, other, -1)
