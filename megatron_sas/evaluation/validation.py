"""Masked-LM loss and terms on held-out packed data, with the same masks at every evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field

from megatron_sas.core import distributed
from megatron_sas.core.settings import Section
from megatron_sas.data.packed import PackedData
from megatron_sas.evaluation.base import Evaluation, Metric
from megatron_sas.evaluation.batching import TokenBatch, evaluating
from megatron_sas.evaluation.observers import AttentionStatistics, Observer, share_pass
from megatron_sas.evaluation.text import micro_batches
from megatron_sas.model.base import MaskedLM
from megatron_sas.objective.base import Batch, Term
from megatron_sas.objective.pretraining import mlm_loss_sum
from megatron_sas.objective.terms import TERMS, Needs

LOSS = Metric(
    "validation_mlm_loss",
    "masked-LM loss on held-out text",
    -1,
    title="MLM loss",
    name="loss",
    printed="validation mlm",
    point=("mlm_loss",),
)


class ValidationSettings(Section):
    """Of the loss on held-out text."""

    validation_sequences: int = Field(256, description="sequences of data.validation for the MLM loss", ge=1)


class ValidationEvaluation(Evaluation):
    """Loss, terms and attention on masked text."""

    settings = ValidationSettings
    metrics = (
        LOSS,
        *(Metric(f"validation_{name}", f"{term.title} on held-out text, per sequence") for name, term in TERMS.items()),
    )

    @classmethod
    def shortages(cls, section: ValidationSettings, text: PackedData) -> list[str]:
        """Fewer sequences than were asked for; the default is no wish."""
        wanted = section.validation_sequences
        if text.num_sequences >= wanted or "validation_sequences" not in section.model_fields_set:
            return []
        return [f"validation_sequences: {wanted} are wanted, but {text.prefix} has {text.num_sequences}"]

    def run(self, model: MaskedLM) -> dict[str, Any]:
        """`LOSS` (mean over masked tokens), `validation_NAME` for every term (R, mean over sequences), and attention.

        `validation_attention` is as `AttentionStatistics` gives it.
        """
        info = self.resources.text.tokenizer
        statistics = AttentionStatistics(info.cls_id, info.sep_id)
        values = self._evaluate(model, self.resources.terms, [statistics])
        return {**values, "validation_attention": statistics.result()}

    def measure(self, model: MaskedLM) -> tuple[dict[str, Any], None]:
        """The loss alone."""
        return {LOSS.column: self._evaluate(model, {}, [])[LOSS.key]}, None

    def _evaluate(self, model: MaskedLM, terms: Mapping[str, Term], observers: Sequence[Observer]) -> dict[str, float]:
        """On the first sequences, shared among the ranks: all make the same number of forward passes."""
        text, section = self.resources.text, self.section
        sizes = (section.validation_sequences, section.batch_tokens)
        with evaluating(model) as device:
            # The loss, masked tokens, sequences, and R of each term.
            sums = torch.zeros(3 + len(terms), dtype=torch.float64, device=device)
            for batch in micro_batches(text, *sizes, self.resources.mask_prob):
                inputs = (batch.input_ids, batch.masked_positions, batch.labels, batch.heads)
                seen = Batch(*(tensor.to(device) for tensor in inputs))
                needs = Needs(terms, seen)
                real = (batch.sample_ids >= 0).to(device)  # (B,)
                tokens = TokenBatch(seen.input_ids, seen.heads, real)
                output = share_pass(model, tokens, observers, masked_positions=seen.masked_positions, **needs.arguments)
                sums[0] += mlm_loss_sum(output.logits, seen.labels)
                sums[1] += len(batch.labels)
                sums[2] += real.sum()
                for place, name in enumerate(terms, start=3):
                    sums[place] += (terms[name](needs.output_for(name, output), seen) * real).sum()
        loss, masked, sequences, *totals = distributed.all_reduce_sum_(sums).tolist()
        values = {f"validation_{name}": total / max(sequences, 1.0) for name, total in zip(terms, totals, strict=True)}
        return {LOSS.key: loss / max(masked, 1.0), **values}
