"""Treebanks to evaluate on: sentences with gold dependency heads, read from CoNLL-U or JSON, cut into tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sas.core.cli import InputError
from megatron_sas.corpus.readers.conllu import read_conllu
from megatron_sas.corpus.readers.text_lines import is_encodable, parse_json
from megatron_sas.corpus.readers.trees import check_blanked, is_blanked, tree_fault
from megatron_sas.data.tokenizer import encode_texts, space_before_words
from megatron_sas.evaluation.files import numbered_lines, read_text


@dataclass(frozen=True)
class Sentence:
    """One parsed sentence. `heads` are 0-based word indices, -1 for a root; `deprels` name the relation to the head."""

    words: Sequence[str]
    heads: Sequence[int]
    deprels: Sequence[str]


class Treebank(list[Sentence]):
    """Sentences; `num_blanked` more were left out because the treebank comes without their words."""

    num_blanked = 0


@dataclass(frozen=True)
class TokenizedSentence:
    """A sentence as `[CLS] tokens [SEP]`."""

    ids: np.ndarray  # int64 (S,)
    words: np.ndarray  # int64 (S,), index of the word that each token belongs to, -1 for [CLS] and [SEP]
    num_words: int


def load_treebank(path: str | Path, limit: int | None = None) -> Treebank:
    """Read a treebank; the suffix decides: `.conllu` is CoNLL-U, `.jsonl` and `.json` JSON lines or one JSON array.

    A JSON sentence is an object with lists `words`, `heads`, `relns` of equal length, where heads count from 1 and 0
    is the root: the form of the dependency files of Clark et al. (2019), and of the paper's WSJ sample. Sentences
    without their words (`trees.is_blanked`) are left out and counted; of the others the first `limit` are returned.

    Raises `InputError` naming file and line (or the element of the array) for anything malformed, for heads that form
    no tree, and for a treebank without words or sentences.
    """
    path = Path(path)
    *others, last = TREEBANK_READERS
    suffixes = f"{', '.join(others)} or {last}"
    if not path.is_file():
        raise InputError(f"{path}: no such file; a treebank is a {suffixes} file")
    if path.suffix not in TREEBANK_READERS:
        raise InputError(f"{path}: unknown kind of treebank {path.suffix!r}; name it {suffixes}")
    sentences, num_blanked = TREEBANK_READERS[path.suffix](path)
    if not sentences:
        check_blanked(path, num_blanked)
        raise InputError(f"{path}: no sentences in it; give a treebank with at least one")
    treebank = Treebank(sentences[:limit])
    treebank.num_blanked = num_blanked
    return treebank


def tokenize_words(sentences: Sequence[Sentence], tokenizer: Any) -> list[TokenizedSentence]:
    """Cut sentences into tokens, one word at a time; a word that the tokenizer reduces to nothing becomes [UNK].

    Where a tokenizer's tokens include the space before a word (`space_before_words`), every word but a sentence's first
    has one. `tokenizer` is a fast Hugging Face tokenizer with [CLS] and [SEP]. Each distinct word is tokenised once.
    """
    space = space_before_words(tokenizer)
    spaced = [[space * (index > 0) + word for index, word in enumerate(sentence.words)] for sentence in sentences]
    vocabulary = list(dict.fromkeys(word for words in spaced for word in words))
    encodings = zip(vocabulary, encode_texts(vocabulary, tokenizer), strict=True)
    tokens = {word: encoding.ids or [tokenizer.unk_token_id] for word, encoding in encodings}
    result = []
    for words in spaced:
        ids = [tokenizer.cls_token_id, *(i for word in words for i in tokens[word]), tokenizer.sep_token_id]
        owners = [-1, *(n for n, word in enumerate(words) for _ in tokens[word]), -1]
        result.append(TokenizedSentence(np.array(ids, np.int64), np.array(owners, np.int64), len(words)))
    return result


def _read_conllu(path: Path) -> tuple[list[Sentence], int]:
    """The sentences that have their words, and how many do not."""
    blanked: list[str] = []
    sentences = [Sentence(s.words, s.heads, s.deprels) for s in read_conllu(path, blanked=blanked.append)]
    return sentences, len(blanked)


def _read_json(path: Path) -> tuple[list[Sentence], int]:
    """The same."""
    every = [_check_sentence(value, where) for value, where in _json_values(path)]
    sentences = [sentence for sentence in every if not is_blanked(sentence.words)]
    return sentences, len(every) - len(sentences)


TREEBANK_READERS: dict[str, Callable[[Path], tuple[list[Sentence], int]]] = {
    ".conllu": _read_conllu,
    ".jsonl": _read_json,
    ".json": _read_json,
}


def _json_values(path: Path) -> Iterator[tuple[Any, str]]:
    """Yield (value, where) for each line, or for each element when the file is one JSON array."""
    text = read_text(path)
    if text.lstrip().startswith("["):
        yield from ((value, f"{path}: element {n}") for n, value in enumerate(parse_json(text, str(path))))
    else:
        yield from ((parse_json(line, where), where) for line, where in numbered_lines(path, text))


def _check_sentence(value: Any, where: str) -> Sentence:
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected an object with words, heads and relns, found {type(value).__name__}")
    for field, kind, name in (("words", str, "strings"), ("heads", int, "integers"), ("relns", str, "strings")):
        items = value.get(field)
        if not isinstance(items, list) or any(type(item) is not kind for item in items):
            raise InputError(f"{where}: field {field!r} must be a list of {name}")
        if kind is str and not all(map(is_encodable, items)):
            raise InputError(f"{where}: half of a surrogate pair in field {field!r}; correct or remove it")
    words, heads, deprels = value["words"], value["heads"], value["relns"]
    if not words or not len(words) == len(heads) == len(deprels):
        sizes = f"{len(words)}, {len(heads)} and {len(deprels)}"
        raise InputError(f"{where}: words, heads and relns must be of one length, at least 1; found {sizes}")
    sentence = Sentence(words, [head - 1 for head in heads], deprels)
    if fault := tree_fault(sentence.heads):
        word, reason = fault
        raise InputError(f"{where}: field 'heads': word {word + 1} ({words[word]!r}) {reason}; 0 marks a root")
    return sentence
