"""Masked-LM loss and SAS term on held-out packed data, with the same masks at every evaluation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sas.core import distributed
from megatron_sas.data.mlm_dataset import validation_batches
from megatron_sas.data.packed import PackedData
from megatron_sas.evaluation.batching import AfterBatch, evaluating
from megatron_sas.evaluation.observers import AttentionStatistics, share_pass
from megatron_sas.model.bert import Bert
from megatron_sas.objective.pretraining import SasObjective, mlm_loss_sum
from megatron_sas.objective.sas import sas_term

VALIDATION_SEED = 0x76616C  # not the run's seed: runs with different seeds are validated on the same masks


@dataclass(frozen=True)
class _MaskedText:
    """Masked sequences as `share_pass` takes a batch; rows that only fill it up do not count."""

    input_ids: Tensor  # int64 (B, S)
    heads: Tensor  # int64 (B, S)
    counts: Tensor  # bool (B,)
    seqlens: None = None


def evaluate_validation(
    model: Bert,
    packed: PackedData,
    sas: SasObjective,
    *,
    num_sequences: int,
    batch_tokens: int,
    mask_prob: float,
    after_batch: AfterBatch | None = None,
    statistics: AttentionStatistics | None = None,
) -> dict[str, float]:
    """`validation_mlm_loss` (mean over masked tokens) and `validation_sas` (R, mean over sequences).

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
    with evaluating(model) as device:
        sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, masked tokens, R, sequences
        for batch in batches:
            counts = batch.sample_ids >= 0
            text = _MaskedText(*(x.to(device) for x in (batch.input_ids, batch.heads, counts)))
            positions = batch.masked_positions.to(device)
            output = share_pass(model, text, statistics=statistics, heads=text.heads, masked_positions=positions)
            sums[0] += mlm_loss_sum(output.logits, batch.labels.to(device))
            sums[1] += len(batch.labels)
            term = sas_term(output.to_head, output.to_dependent, mode=sas.mode, p=sas.p, directions=sas.directions)
            sums[2] += term.sum()
            sums[3] += int(counts.sum())
            if after_batch is not None:
                after_batch()
    loss, tokens, term, sequences = distributed.all_reduce_sum_(sums).tolist()
    return {"validation_mlm_loss": loss / max(tokens, 1.0), "validation_sas": term / max(sequences, 1.0)}
