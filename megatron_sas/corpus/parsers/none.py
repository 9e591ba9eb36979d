"""No parser: text without heads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from megatron_sas.corpus.parsers.base import Parse, Parser, RelationNames

if TYPE_CHECKING:
    from tokenizers import Encoding


class NoParser(Parser):
    """No heads: words are the tokenizer's own, and a line is a sentence."""

    remark, heads = "no heads; a line is a sentence", "none"

    def parse(self, contents: list[str], encodings: list[Encoding], names: RelationNames) -> Iterator[Parse]:
        """Words of the lines without heads (see `Parser`)."""
        for encoding in encodings:
            words = np.array(encoding.word_ids, dtype=np.int64)
            offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
            first = np.flatnonzero(np.diff(words, prepend=-1) != 0)
            last = np.append(first[1:], len(words)) - 1 if len(first) else first
            yield Parse(
                starts=offsets[first, 0],
                ends=offsets[last, 1],
                heads=np.full(len(first), -1, dtype=np.int64),
                relations=np.zeros(len(first), dtype=np.int64),
                sentence_starts=np.arange(len(first)) == 0,
                is_word=np.ones(len(first), dtype=bool),
            )
