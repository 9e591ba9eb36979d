"""Held-out text, unmasked, as batches for a forward pass: packed sequences, or a file packed the same way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from megatron_sas.core import distributed
from megatron_sas.core.cli import InputError
from megatron_sas.corpus.build.pack import Packer
from megatron_sas.corpus.readers.base import Reading
from megatron_sas.corpus.readers.registry import read_units
from megatron_sas.data.mlm_dataset import MicroBatch, validation_batches
from megatron_sas.data.packed import PackedData
from megatron_sas.data.tokenizer import plain_text_tokenizer, tokenizer_identity
from megatron_sas.data.unknown import Unknown
from megatron_sas.evaluation.batching import TokenBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VALIDATION_SEED = 0x76616C  # not the run's seed: runs with different seeds are validated on the same masks


@dataclass(frozen=True, kw_only=True)
class TextBatch(TokenBatch):
    """B texts of S tokens without padding."""

    numbers: Tensor  # int64 (B,), which texts these are

    def to(self, device: torch.device) -> TextBatch:
        """A copy on `device`."""
        names = ("numbers", "input_ids", "dep_heads")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def open_packed_text(prefix: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> PackedData:
    """Packed data for models with this tokenizer and maximum length.

    Raises:
        InputError: it is broken or does not fit such models.
    """
    packed = PackedData(prefix)
    if not tokenizer_identity(tokenizer).matches(packed.tokenizer.identity):
        raise InputError(f"{prefix}.json: its tokenizer is not that of the model; pack the text with the model's")
    if packed.seq_length > max_length:
        raise InputError(
            f"{prefix}.json: sequences of {packed.seq_length} tokens, but the model takes at most {max_length}; "
            f"pack the text with --seq-length {max_length}"
        )
    return packed


def unknown_in(packed: PackedData, num_sequences: int) -> Unknown:
    """How much of the first `num_sequences` sequences the tokenizer did not know."""
    info = packed.tokenizer
    return Unknown.of(packed.tokens[np.arange(num_sequences)], info.unk_id, info.special_ids)


def packed_text(packed: PackedData, *, num_sequences: int, batch_tokens: int) -> Iterator[TextBatch]:
    """This rank's share of the first `num_sequences` sequences; every rank yields equally many batches."""
    for batch in micro_batches(packed, num_sequences, batch_tokens, mask_prob=0.0):
        counts = bool((batch.sample_ids >= 0).any())
        rows = batch.sample_ids >= 0 if counts else slice(0, 1)
        yield TextBatch(batch.input_ids[rows], batch.heads[rows], counts, numbers=batch.sample_ids[rows])


def micro_batches(packed: PackedData, num_sequences: int, batch_tokens: int, mask_prob: float) -> Iterator[MicroBatch]:
    """This rank's `validation_batches` of at most `batch_tokens` tokens, or of one sequence, masked always alike."""
    size, rank, world_size = max(1, batch_tokens // packed.seq_length), distributed.rank(), distributed.world_size()
    sizes = {"micro_batch_size": size, "num_sequences": num_sequences, "rank": rank, "world_size": world_size}
    return validation_batches(packed, **sizes, seed=VALIDATION_SEED, mask_prob=mask_prob)


def pack_file(
    path: str, tokenizer: PreTrainedTokenizerBase, *, seq_length: int, num_sequences: int, text_field: str = "text"
) -> np.ndarray:
    """The first `num_sequences` sequences that tools/preprocess_data.py would make of a file: int64 (N, `seq_length`).

    Raises:
        InputError: no such file, broken input, or too little text for one sequence.
    """
    rows: list[np.ndarray] = []
    packer = Packer(
        seq_length,
        tokenizer.cls_token_id,
        tokenizer.sep_token_id,
        lambda tokens, *_: rows.append(tokens.astype(np.int64)),
    )
    encode = plain_text_tokenizer(tokenizer.backend_tokenizer.to_str()).encode
    for unit in read_units([path], Reading(text_field=text_field)):
        if unit.starts_document:
            packer.start_document()
        if unit.content is not None:
            text = unit.content if isinstance(unit.content, str) else unit.content.text
            ids = np.array(encode(text, add_special_tokens=False).ids, np.int32)
            nothing = np.zeros(len(ids), np.int64)
            packer.add(ids, nothing, nothing, nothing)
        if len(rows) >= num_sequences:
            break
    if not rows:
        raise InputError(f"{path}: too little text for one sequence of {seq_length} tokens; give more, or --seq-length")
    return np.stack(rows[:num_sequences])


def plain_text(rows: np.ndarray, batch_tokens: int) -> list[TextBatch]:
    """Sequences (N, S) of token ids as batches, all on every rank."""
    ids = torch.from_numpy(rows)
    numbers = torch.arange(len(ids)).split(max(1, batch_tokens // ids.shape[1]))
    return [TextBatch(ids[part], torch.full_like(ids[part], -1), numbers=part) for part in numbers]
