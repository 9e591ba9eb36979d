"""Mean entropy of attention: how evenly heads spread it, whatever they attend to.

    R = mean over layers, heads and rows of H_i = -Σ_j α_ij log α_ij,  in nats

λ > 0 sharpens attention, λ < 0 spreads it. A row is a token that attends; rows of padding do not count. All tokens that
the model sees are attended to. The probabilities are those before dropout. `kernels/entropy.py` has H and its gradient,
which cost about as much as a second pass of attention in every layer.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from megatron_sas.kernels import attention_entropy, hands_out_entropy
from megatron_sas.model.base import ModelOutput
from megatron_sas.objective.base import QUERIES_KEYS, Batch, Counts, TermSection


class EntropySection(TermSection):
    """Mean entropy of attention: loss = MLM + λ·R. λ > 0 sharpens it, λ < 0 spreads it; default: no part of the run."""


class EntropyTerm:
    """The entropy of attention as a `Term`."""

    name, title, section_class = "entropy", "entropy of attention", EntropySection
    needs = frozenset({QUERIES_KEYS})
    in_every_run = syntactic = False
    reduction = "sequence"  # R is a mean already, so a sum over the micro-batch would have no use

    def __init__(self, section: EntropySection, special_ids: Sequence[int] = ()) -> None:
        self.section, self.padding_ids = section, tuple(special_ids[:1])

    def describe(self) -> str:
        """What R is a mean of."""
        return "mean over layers, heads and tokens, in nats"

    def __call__(self, output: ModelOutput, batch: Batch) -> Tensor:
        """R of every sequence, `(B,)`; 0 for a sequence of nothing but padding."""
        rows = batch.holds_text(self.padding_ids)  # (B, S)
        total = 0.0
        for q, k, window, backend in output.queries_keys:
            able = hands_out_entropy(backend, q, window)  # else another kernel than the layer's
            entropy = attention_entropy(q, k, window=window, backend=backend if able else "auto")  # (B, H, S)
            total = total + (entropy.mean(dim=1) * rows).sum(dim=1)
        return total / (rows.sum(dim=1).clamp(min=1) * len(output.queries_keys))

    def metrics(self, total: float, counts: Counts) -> dict[str, float]:
        """The mean over sequences."""
        return {self.name: total / counts.sequences}
