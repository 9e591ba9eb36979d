"""No parser: the gold heads of CoNLL-U sentences, or text without heads."""

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

    def parse(self, contents: list[ConlluSentence], encodings: list[Encoding], names: RelationNames) -> Iterator[Parse]:
        """Parses of the sentences (see `Parser`)."""
        for sentence in contents:
            yield Parse.of_words(sentence.spans, sentence.heads, [names.number(name) for name in sentence.deprels])


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
            spans = np.stack([offsets[first, 0], offsets[last, 1]], axis=1)
            yield Parse.of_words(spans, np.full(len(first), -1), np.zeros(len(first), np.int64))
