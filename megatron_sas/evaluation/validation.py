"""Masked-LM loss and terms on held-out packed data, with the same masks at every evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from megatron_sas.core import distributed
from megatron_sas.core.settings import Section
from megatron_sas.data.mlm_dataset import validation_batches
from megatron_sas.data.packed import PackedData
from megatron_sas.evaluation.base import Evaluation, Metric
from megatron_sas.evaluation.batching import AfterBatch, evaluating
from megatron_sas.evaluation.observers import AttentionStatistics, share_pass
from megatron_sas.model.base import MaskedLM
from megatron_sas.objective.base import Batch, Term
from megatron_sas.objective.pretraining import mlm_loss_sum
from megatron_sas.objective.terms import TERMS, Needs

VALIDATION_SEED = 0x76616C  # not the run's seed: runs with different seeds are validated on the same masks

LOSS = Metric(
    "validation_mlm_loss",
    "masked-LM loss on held-out text",
    direction=-1,
    title="MLM loss",
    name="loss",
    printed="validation mlm",
    point=("mlm_loss",),
)


@dataclass(frozen=True)
class _MaskedText:
    """Masked sequences as `share_pass` takes a batch; rows that only fill it up do not count."""

    input_ids: Tensor  # int64 (B, S)
    heads: Tensor  # int64 (B, S)
    counts: Tensor  # bool (B,)
    seqlens: None = None


def evaluate_validation(
    model: MaskedLM,
    packed: PackedData,
    terms: Mapping[str, Term],
    *,
    num_sequences: int,
    batch_tokens: int,
    mask_prob: float,
    after_batch: AfterBatch | None = None,
    statistics: AttentionStatistics | None = None,
) -> dict[str, float]:
    """`LOSS` (mean over masked tokens) and for every term `validation_NAME` (R, mean over sequences).

    The first `num_sequences` sequences are shared among the ranks, which all make the same number of forwards and all
    return the same values. `after_batch` is called after each forward, which also feeds `statistics`.
    """
    batches = validation_batches(
        packed,
        micro_batch_size=max(1, batch_tokens // packed.seq_length),
        num_sequences=num_sequences,
        seed=VALIDATION_SEED,
        mask_prob=mask_prob,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )
    names = list(terms)
    with evaluating(model) as device:
        sums = torch.zeros(3 + len(names), dtype=torch.float64, device=device)  # loss, masked tokens, sequences, each R
        for batch in batches:
            inputs = (batch.input_ids, batch.masked_positions, batch.labels, batch.heads)
            seen = Batch(*(tensor.to(device) for tensor in inputs))
            needs = Needs(terms, seen)
            real = (batch.sample_ids >= 0).to(device)  # (B,)
            text = _MaskedText(seen.input_ids, seen.heads, real)
            output = share_pass(
                model, text, statistics=statistics, masked_positions=seen.masked_positions, **needs.arguments
            )
            sums[0] += mlm_loss_sum(output.logits, seen.labels)
            sums[1] += len(batch.labels)
            sums[2] += real.sum()
            for place, name in enumerate(names, start=3):
                sums[place] += (terms[name](needs.output_for(name, output), seen) * real).sum()
            if after_batch is not None:
                after_batch()
    loss, tokens, sequences, *totals = distributed.all_reduce_sum_(sums).tolist()
    values = {f"validation_{name}": total / max(sequences, 1.0) for name, total in zip(names, totals, strict=True)}
    return {LOSS.key: loss / max(tokens, 1.0), **values}


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
    def wanted(cls, section: ValidationSettings) -> bool:
        """Wherever there is a text."""
        return True

    @classmethod
    def shortages(cls, section: ValidationSettings, text: PackedData) -> list[str]:
        """Fewer sequences than were asked for; the default is no wish."""
        wanted = section.validation_sequences
        if text.num_sequences >= wanted or "validation_sequences" not in section.model_fields_set:
            return []
        return [f"validation_sequences: {wanted} are wanted, but {text.prefix} has {text.num_sequences}"]

    def run(self, model: MaskedLM, after_batch: AfterBatch | None = None) -> dict[str, Any]:
        """See `evaluate_validation`; with `validation_attention`, as `AttentionStatistics` gives it."""
        info = self.resources.text.tokenizer
        statistics = AttentionStatistics(info.cls_id, info.sep_id)
        values = self._evaluate(model, self.resources.terms, after_batch, statistics)
        return {**values, "validation_attention": statistics.result()}

    def measure(self, model: MaskedLM) -> tuple[dict[str, Any], None]:
        """The loss alone."""
        return {LOSS.column: self._evaluate(model, {})[LOSS.key]}, None

    def _evaluate(
        self,
        model: MaskedLM,
        terms: Mapping[str, Term],
        after_batch: AfterBatch | None = None,
        statistics: AttentionStatistics | None = None,
    ) -> dict[str, float]:
        return evaluate_validation(
            model,
            self.resources.text,
            terms,
            num_sequences=self.section.validation_sequences,
            batch_tokens=self.section.batch_tokens,
            mask_prob=self.resources.mask_prob,
            after_batch=after_batch,
            statistics=statistics,
        )
