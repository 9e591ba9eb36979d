"""No parser: the gold heads of CoNLL-U sentences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from megatron_sas.corpus.parsers.base import Parse, Parser, RelationNames
from megatron_sas.corpus.readers.conllu import ConlluSentence

if TYPE_CHECKING:
    from tokenizers import Encoding


class ConlluParser(Parser):
    """Gold heads of CoNLL-U sentences."""

    remark, heads = "gold heads of .conllu inputs", "gold"

    @staticmethod
    def text(content: ConlluSentence) -> str:
        """The sentence's surface text."""
        return content.text

    def parse(self, contents: list[ConlluSentence], encodings: list[Encoding], names: RelationNames) -> Iterator[Parse]:
        """Parses of the sentences (see `Parser`)."""
        for sentence in contents:
            spans = np.array(sentence.spans, dtype=np.int64)
            yield Parse(
                starts=spans[:, 0],
                ends=spans[:, 1],
                heads=np.array(sentence.heads, dtype=np.int64),
                relations=np.array([names.number(name) for name in sentence.deprels], dtype=np.int64),
                sentence_starts=np.arange(len(spans)) == 0,
                is_word=np.ones(len(spans), dtype=bool),
            )
