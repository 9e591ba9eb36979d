"""Packed data → accumulation windows of masked micro-batches.

B (or m) sequences in a micro-batch, S tokens a sequence, M masked tokens in a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_sas.core.cli import InputError
from megatron_sas.data.masking import BERT_SPLIT, Split, mask_tokens
from megatron_sas.data.mixture import MixedData, stream_samples
from megatron_sas.data.packed import PackedData


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass needs; all tensors int64."""

    index: int  # j: the number of this micro-batch in its global batch, the same for any number of ranks
    sample_ids: torch.Tensor  # (m,); -1 for a filler row of `validation_batches`
    input_ids: torch.Tensor  # (m, S)
    masked_positions: torch.Tensor  # (M,) flat indices into m·S, ascending; 0 where it is filled up
    labels: torch.Tensor  # (M,) original tokens at the masked positions; -100 where it is filled up
    heads: torch.Tensor  # (m, S)

    def pin_memory(self) -> MicroBatch:
        """A copy in page-locked memory, from which copies to a GPU are asynchronous."""
        names = ("sample_ids", "input_ids", "masked_positions", "labels", "heads")
        return replace(self, **{name: getattr(self, name).pin_memory() for name in names})


@dataclass(frozen=True)
class Window:
    """One rank's share of a global batch: what it accumulates before an optimizer step."""

    step: int
    micro_batches: list[MicroBatch]
    num_masked: int  # on this rank, in the whole window

    def pin_memory(self) -> Window:
        """A copy in page-locked memory."""
        return replace(self, micro_batches=[batch.pin_memory() for batch in self.micro_batches])


SAMPLES_AT_ONCE = 4096
IGNORED = -100  # a label that torch's cross-entropy leaves out


def masked_capacity(tokens: int, mask_prob: float) -> int:
    """A fixed M that the masked tokens among `tokens` practically never exceed: six standard deviations, in 64s.

    Equal shapes let a compiled step be used again. A batch with more (one in 10⁹) gets what it needs.
    """
    most = tokens * mask_prob + 6 * math.sqrt(tokens * mask_prob * (1 - mask_prob))
    return min(tokens, 64 * math.ceil(most / 64))


def _batches(
    packed: PackedData | MixedData,
    indices: Sequence[int],
    samples: np.ndarray,
    epochs: int | np.ndarray,
    seed: int,
    mask_prob: float,
    split: Split = BERT_SPLIT,
    capacity: int = 0,
) -> Iterator[MicroBatch]:
    """Read and mask `samples` (A·m,), and cut them into A micro-batches with these `indices`.

    Rows with sample -1 repeat sample 0 without labels and without edges. With fewer than `capacity` masked tokens the
    rest of M is filled up. All micro-batches at once, because on few tokens every call of NumPy costs the same.
    """
    filler = samples < 0
    rows = np.where(filler, 0, samples)
    tokens = np.asarray(packed.tokens[rows])
    info = packed.tokenizer
    _check_range(packed, "tokens", tokens, rows, 0, info.vocab_size)
    input_ids, selected = mask_tokens(
        tokens,
        rows,
        epochs,
        seed,
        mask_prob=mask_prob,
        vocab_size=info.vocab_size,
        mask_id=info.mask_id,
        special_ids=info.special_ids,
        split=split,
    )
    heads = np.asarray(packed.heads[rows], dtype=np.int64)
    _check_range(packed, "heads", heads, rows, -1, packed.seq_length)
    if filler.any():
        selected[filler] = False
        heads[filler] = -1
    size = len(samples) // len(indices)
    for number, index in enumerate(indices):
        part = slice(number * size, (number + 1) * size)
        chosen = np.flatnonzero(selected[part])
        positions = np.zeros(max(len(chosen), capacity), dtype=np.int64)
        labels = np.full(len(positions), IGNORED, dtype=np.int64)
        positions[: len(chosen)], labels[: len(chosen)] = chosen, tokens[part].ravel()[chosen]
        arrays = samples[part].astype(np.int64), input_ids[part], positions, labels, heads[part]
        yield MicroBatch(index, *map(torch.from_numpy, arrays))


def _check_range(
    packed: PackedData | MixedData, stream: str, values: np.ndarray, rows: np.ndarray, low: int, high: int
) -> None:
    """Refuse values outside of [low, high), which only a damaged file holds, before they crash a device."""
    if values.min() < low or values.max() >= high:
        wrong = (values < low) | (values >= high)
        part, sequence = packed.locate(rows[wrong.any(axis=1)][0])
        path = f"{part.prefix}.bin" if stream == "tokens" else part.heads_path
        raise InputError(
            f"{path}: sequence {sequence} holds {values[wrong][0]}, which is not between {low} and {high - 1}; the "
            "file is damaged: copy it anew or preprocess again"
        )


class MLMDataset:
    """The training stream as a pure function of the step.

    Global batch `step` is cut into micro-batches of `micro_batch_size`; micro-batch j = a·world_size + rank is the a-th
    that `rank` accumulates. Its content depends on (seed, step, j) alone.

    `mask_prob` is the probability with which a token is masked, or gives it by the step; `largest_mask_prob` is then
    the largest that it ever gives. With `fixed_shapes` the number of masked positions is filled up to the
    `masked_capacity` of the largest.

    Raises:
        InputError: the global batch is not a multiple of micro_batch_size × world_size.
    """

    def __init__(
        self,
        packed: PackedData | MixedData,
        *,
        seed: int,
        mask_prob: float | Callable[[int], float],
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        largest_mask_prob: float | None = None,
        split: Split = BERT_SPLIT,
        fixed_shapes: bool = False,
    ) -> None:
        if global_batch_size % (micro_batch_size * world_size):
            raise InputError(
                f"global batch {global_batch_size} is not a multiple of micro batch {micro_batch_size} × {world_size} "
                "processes; change one of the three"
            )
        self.packed = packed
        self.seed, self.split = seed, split
        self.mask_prob = mask_prob if callable(mask_prob) else lambda step: mask_prob
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.rank, self.world_size = rank, world_size
        self.accumulation = global_batch_size // (micro_batch_size * world_size)
        largest = mask_prob if largest_mask_prob is None else largest_mask_prob
        self.capacity = masked_capacity(micro_batch_size * packed.seq_length, largest) if fixed_shapes else 0
        # Sample numbers are computed for many steps at once: on few of them every call of NumPy costs the same.
        self._steps_at_once = max(1, SAMPLES_AT_ONCE // global_batch_size)
        self._at_once: tuple[int, np.ndarray, np.ndarray] = -1, *np.empty((2, 0), np.int64)

    def window(self, step: int) -> Window:
        """This rank's micro-batches of global batch `step`, in the order in which they are accumulated."""
        samples, epochs = (values.reshape(-1, self.world_size, self.micro_batch_size) for values in self._samples(step))
        indices = range(self.rank, len(samples) * self.world_size, self.world_size)
        own = (values[:, self.rank].ravel() for values in (samples, epochs))
        masking = self.seed, self.mask_prob(step), self.split, self.capacity
        batches = list(_batches(self.packed, indices, *own, *masking))
        return Window(step, batches, sum(int((batch.labels.numpy() != IGNORED).sum()) for batch in batches))

    def _samples(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples and their epochs of global batch `step`, int64 (G,)."""
        block, number = divmod(step, self._steps_at_once)
        if self._at_once[0] != block:
            size = self._steps_at_once * self.global_batch_size
            self._at_once = block, *stream_samples(self.packed, block, size, self.seed)
        rows = slice(number * self.global_batch_size, (number + 1) * self.global_batch_size)
        return self._at_once[1][rows], self._at_once[2][rows]


def validation_batches(
    packed: PackedData,
    *,
    micro_batch_size: int,
    num_sequences: int,
    seed: int,
    mask_prob: float,
    rank: int,
    world_size: int,
) -> Iterator[MicroBatch]:
    """This rank's share of the first `num_sequences` sequences (fewer if there are fewer), masked the same way always.

    Every rank yields the same number of batches of the same shape: missing rows are fillers (`sample_ids` -1) that
    repeat sequence 0 with neither labels nor edges.
    """
    total = min(num_sequences, packed.num_sequences)
    per_round = micro_batch_size * world_size
    for number in range(-(-total // per_round)):
        index = number * world_size + rank
        samples = np.arange(index * micro_batch_size, (index + 1) * micro_batch_size, dtype=np.int64)
        yield from _batches(packed, [index], np.where(samples < total, samples, -1), 0, seed, mask_prob)
