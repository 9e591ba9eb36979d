"""How much of a text a tokenizer does not know, for every tool that packs text or evaluates on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_SHARE = 0.05  # BERT's vocabulary has 0.1 % in Wikipedia; more than this is another tokenizer's text, or none's


@dataclass(frozen=True)
class Unknown:
    """Of `tokens` of text, special tokens aside, `unknown` are [UNK]."""

    tokens: int = 0
    unknown: int = 0

    @staticmethod
    def of(ids: np.ndarray, unk_id: int, special_ids: Sequence[int] = ()) -> Unknown:
        """Count in token ids of any shape; `special_ids` are no text."""
        return Unknown(int(ids.size - np.isin(ids, special_ids).sum()), int((ids == unk_id).sum()))

    def __add__(self, other: Unknown) -> Unknown:
        return Unknown(self.tokens + other.tokens, self.unknown + other.unknown)

    @property
    def share(self) -> float:
        """From 0 to 1."""
        return self.unknown / max(self.tokens, 1)

    @property
    def is_high(self) -> bool:
        """Whether it is more than `MAX_SHARE`."""
        return self.share > MAX_SHARE

    def record(self) -> dict[str, Any]:
        """For result files."""
        return {"num_pieces": self.tokens, "num_unknown": self.unknown, "share": self.share}

    @staticmethod
    def from_record(record: dict[str, Any]) -> Unknown:
        """What `record` was made of."""
        return Unknown(record["num_pieces"], record["num_unknown"])

    def line(self, what: str) -> str:
        """The count in words, with a warning when it is too high; `what` names the text."""
        counted = f"{self.unknown:,} of {self.tokens:,} pieces of {what} are [UNK] ({self.share:.2%})"
        if not self.is_high:
            return counted
        return f"warning: {counted}, which the model cannot tell apart; is this the tokenizer for this text?"
