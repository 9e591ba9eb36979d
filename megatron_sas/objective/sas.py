"""The SAS regularizer: attention along syntactic dependencies (Chen et al., ICLR 2024, section 3).

R is that of `along_edges.py`, along the data's own edges. The paper's code reads probabilities after attention dropout;
here they are those before it.
"""

from __future__ import annotations

from torch import Tensor

from megatron_sas.objective.along_edges import EdgeSection, EdgeTerm
from megatron_sas.objective.base import Batch


class SasSection(EdgeSection):
    """The SAS regularizer: loss = MLM + λ·R. λ > 0 suppresses syntactic attention, λ < 0 promotes it."""


class SasTerm(EdgeTerm):
    """Attention along the dependency heads that come with the data."""

    name, title, section_class = "sas", "SAS term", SasSection
    in_every_run = syntactic = True

    def edges(self, batch: Batch) -> Tensor:
        """The data's heads `(B, S)`."""
        return batch.heads
