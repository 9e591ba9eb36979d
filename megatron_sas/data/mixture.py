"""Several packed data sets as one training stream: all of their sequences shuffled together, or mixed by weights.

Parsed and unparsed text stand side by side this way: sequences without edges have heads of -1.
"""

from __future__ import annotations

import hashlib
import json
import resource
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from megatron_sas.core.cli import InputError
from megatron_sas.core.settings import Section
from megatron_sas.data.packed import OPEN_FILES, PackedData, check_same_form, packed_header
from megatron_sas.data.sampler import block_shares, global_samples, mixture_samples

_OTHER_FILES = 256  # that a training process may need besides: libraries, sockets between processes, checkpoints


class TrainingPart(Section):
    """One of several sources of training data."""

    prefix: str = Field(description="prefix of packed data")
    weight: float | None = Field(None, description="share of the stream, relative to the others'", gt=0)


class DataSection(Section):
    """Packed data, as written by tools/preprocess_data.py."""

    train: str | tuple[TrainingPart, ...] = Field(
        description="prefix of the training data, or a list of prefixes (shuffled together) or of {prefix, weight}"
    )
    validation: str | None = Field(None, description="prefix of the validation data")
    tokenizer: str | None = Field(None, description="vocabulary or directory; default: the one named by the data")
    mask_prob: float = Field(
        0.15, description="probability with which a token is masked; in training masking.rate replaces it", gt=0, lt=1
    )
    heads: str | None = Field(None, description="name of a control made by tools/make_control.py instead of the parses")

    @field_validator("train", mode="before")
    @classmethod
    def _list_of_parts(cls, value: Any) -> Any:
        """Report a list's faults here: pydantic would report them once as a text and once as a list."""
        if isinstance(value, str):
            return value
        try:
            if not isinstance(value, list | tuple):
                raise TypeError
            parts = [{"prefix": part} if isinstance(part, str) else part for part in value]
            return tuple(TrainingPart.model_validate(part) for part in parts)
        except (TypeError, ValidationError):
            raise PydanticCustomError(
                "training_data", "should be a prefix, a list of prefixes, or a list of {prefix, weight}, weight > 0"
            ) from None

    def parts(self) -> list[tuple[str, float | None]]:
        """Prefix and weight of every part of the training data."""
        return [(self.train, None)] if isinstance(self.train, str) else [(p.prefix, p.weight) for p in self.train]

    def faults(self) -> list[str]:
        """A mixture needs parts, all with weights or all without."""
        weights = [weight for _, weight in self.parts()]
        if not weights:
            return ["train: is an empty list"]
        if None in weights and any(weights):
            return ["train: some parts have a weight and some have none; give all of them one, or none"]
        return []


class MixedData:
    """Packed data sets behind one numbering: sequence `offsets[k] + i` is sequence i of part k.

    It has the attributes of `PackedData` that training uses; `tokens[rows]` and `heads[rows]` gather rows (k, S).
    `shares` is (K,) int64 from `block_shares`, or None without weights (every sequence once an epoch).

    Raises:
        InputError: the parts differ in tokenizer or sequence length.
    """

    def __init__(self, parts: Sequence[PackedData], weights: Sequence[float | None]) -> None:
        first = parts[0]
        for part in parts:
            check_same_form("data.train", part, first)
        self.parts = list(parts)
        self.sizes = [part.num_sequences for part in parts]
        self.offsets = np.append(0, np.cumsum(self.sizes))
        self.shares = None if None in weights else block_shares(weights)
        self.seq_length, self.tokenizer = first.seq_length, first.tokenizer
        self.num_sequences = int(self.offsets[-1])
        self.heads_name = first.heads_name
        self.prefix = ", ".join(part.prefix for part in parts)
        self.tokens, self.heads = _Rows(self, "tokens"), _Rows(self, "heads")

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the parts' fingerprints and shares: what decides which sequences a run sees."""
        shares = None if self.shares is None else self.shares.tolist()
        return hashlib.sha256(json.dumps([[part.fingerprint for part in self.parts], shares]).encode()).hexdigest()

    @property
    def heads_fingerprint(self) -> str:
        """SHA-256 of those of the parts' heads."""
        return hashlib.sha256(json.dumps([part.heads_fingerprint for part in self.parts]).encode()).hexdigest()

    @property
    def header(self) -> dict[str, Any]:
        """The parts' records of their origin, together."""
        headers, counts = [part.header for part in self.parts], Counter()
        for header in headers:
            counts.update(header.get("counts", {}))
        parsers = dict.fromkeys(header.get("parser", {}).get("name", "unknown") for header in headers)
        inputs = [name for header in headers for name in header.get("inputs", [])]
        return {"inputs": inputs, "parser": {"name": " + ".join(parsers)}, "counts": dict(counts)}

    def verify(self) -> None:
        """Compare every file with its checksum (reads it all); `InputError` at the first mismatch."""
        for part in self.parts:
            part.verify()

    def locate(self, row: int) -> tuple[PackedData, int]:
        """The part that sequence `row` lies in, and its number there."""
        number = int(np.searchsorted(self.offsets, row, side="right")) - 1
        return self.parts[number], int(row - self.offsets[number])

    def __len__(self) -> int:
        return self.num_sequences


class _Rows:
    """Rows of one stream of all parts."""

    def __init__(self, data: MixedData, stream: str) -> None:
        self._data, self._stream = data, stream

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """`rows` (k,) integers → (k, S)."""
        numbers = np.searchsorted(self._data.offsets, rows, side="right") - 1
        streams = [getattr(part, self._stream) for part in self._data.parts]
        result = np.empty((len(rows), self._data.seq_length), dtype=streams[0].dtype)
        for number in np.unique(numbers):
            here = numbers == number
            result[here] = streams[number][rows[here] - self._data.offsets[number]]
        return result


def open_training_data(
    parts: Sequence[tuple[str, float | None]], heads_name: str | None = None
) -> PackedData | MixedData:
    """Open (prefix, weight) pairs: one is `PackedData`, several are `MixedData`; weights for all of them or for none.

    Of several, those without a sequence (shards of too little text) are passed over, unless they have a weight.

    Raises:
        InputError: no part holds a sequence, or one with a weight does not; more parts than files may be open; and see
            `PackedData` and `MixedData`.
    """
    if len(parts) > 1:
        given = parts[0][0]
        parts = [part for part in parts if part[1] is not None or packed_header(part[0])["num_sequences"]]
        if not parts:
            raise InputError(f"data.train: {given} and the others hold no sequence; give data of more text")
    _allow_open_files(len(parts))
    opened = [PackedData(prefix, heads_name=heads_name) for prefix, _ in parts]
    return opened[0] if len(opened) == 1 else MixedData(opened, [weight for _, weight in parts])


def _allow_open_files(parts: int) -> None:
    """Raise the process's own limit of open files as far as the system lets it, if `parts` need that."""
    needed = OPEN_FILES * parts + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if parts == 1 or soft == resource.RLIM_INFINITY or needed <= soft:
        return
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise InputError(
            f"data.train: {parts} parts need {needed} open files, but a process may have {hard} (ulimit -Hn); merge "
            "them with tools/merge_data.py, or have the limit raised"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def stream_samples(
    data: PackedData | MixedData, step: int, global_batch_size: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sequence numbers (G,) and epochs (G,) of global batch `step`: a function of the arguments alone."""
    if isinstance(data, MixedData) and data.shares is not None:
        return mixture_samples(step, global_batch_size, data.sizes, data.shares, seed)
    return global_samples(step, global_batch_size, data.num_sequences, seed)
