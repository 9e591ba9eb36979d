"""The sentences to show: from a treebank, or from plain text with the trees of a parser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_sas.core.cli import InputError
from megatron_sas.corpus.parsers.base import Parse, RelationNames
from megatron_sas.corpus.parsers.registry import check_predicts, describe_parser, make_parser, predictor_usage
from megatron_sas.corpus.readers.base import Reading
from megatron_sas.corpus.readers.registry import read_units
from megatron_sas.evaluation.treebank import TREEBANK_READERS, Sentence, Treebank, load_treebank


def load_sentences(path: str | Path, parser: str | None) -> Treebank:
    """The sentences of a file, with trees.

    Args:
        path: a treebank (`load_treebank`), or a .txt file with any number of sentences a line.
        parser: one that predicts (`parsers.registry.PARSERS`) for text; None for treebanks, whose own trees are taken.

    Raises:
        InputError: an unreadable file, text without a parser or a treebank with one.
    """
    path = Path(path)
    if path.suffix in TREEBANK_READERS:
        if parser is not None:
            raise InputError(f"--parser {parser}: {path} has trees of its own; leave --parser out")
        return load_treebank(path)
    if parser is None:
        raise InputError(
            f"{path}: is text without trees; give --parser {predictor_usage()}, or a .conllu, .jsonl or .json file"
        )
    check_predicts(parser)
    describe_parser(parser)
    texts = [unit.content for unit in read_units([str(path)], Reading())]
    names = RelationNames()
    parses = make_parser(parser).parse(texts, [None] * len(texts), names)  # only `none` looks at sub-words
    return Treebank(
        sentence for text, parse in zip(texts, parses, strict=True) for sentence in _sentences(text, parse, names.names)
    )


def _sentences(text: str, parse: Parse, names: list[str]) -> Iterator[Sentence]:
    """The sentences of a parsed text; white space is no word, nor is a word without characters of its own."""
    kept = parse.is_word & (parse.ends > parse.starts)
    number = np.cumsum(parse.sentence_starts)
    for sentence in np.unique(number[kept]):
        words = np.flatnonzero(kept & (number == sentence))
        place = {int(word): index for index, word in enumerate(words)}
        yield Sentence(
            words=[text[parse.starts[word] : parse.ends[word]] for word in words],
            heads=[place.get(int(parse.heads[word]), -1) for word in words],
            deprels=[names[parse.relations[word]] for word in words],
        )
