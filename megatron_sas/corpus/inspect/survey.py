"""One pass over a corpus before it is parsed: documents that occur twice, and documents with evaluation sentences.

Documents are compared by a hash of their text without regard to case and white space. An evaluation sentence counts as
found where its words, in lower case and without punctuation, follow each other in one paragraph; the spelling of Penn
treebanks ("do n't", "-LRB-") is undone first, in both.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import re
import signal
import sys
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from megatron_sas.core.cli import InputError, progress
from megatron_sas.core.processes import worker_pool
from megatron_sas.corpus.build.documents import SURVEY_FORMAT, SURVEY_VERSION
from megatron_sas.corpus.readers.base import ReadSettings
from megatron_sas.corpus.readers.registry import input_files, read_units, reader_of, repeated_name, source_name

_WORD = re.compile(r"\w+")
_EXAMPLES = 20
_BRACKET = re.compile(r"-[lr][rcs]b-")
# Spaces that Penn treebanks put into words. (Those before "'s" and the like need nothing: "'" separates words anyway.)
_SPLITTERS = ("n't", "n’t", "can not", "gon na", "wan na", "got ta", "gim me", "lem me")
_SPLIT = re.compile(
    r" (?:(?=n['’]t\b)|(?<=\bcan )(?=not\b)|(?<=\bgon )(?=na\b)|(?<=\bwan )(?=na\b)|(?<=\bgot )(?=ta\b)"
    r"|(?<=\bgim )(?=me\b)|(?<=\blem )(?=me\b))"
)


@dataclass
class SurveySettings(ReadSettings):
    """What `tools/survey_corpus.py` takes; its --help explains each. `sentences`: of each evaluation set."""

    inputs: list[str]
    sentences: dict[str, list[str]] = field(default_factory=dict)
    min_words: int = 6
    exclude: tuple[str, ...] = ("duplicates", "contaminated")

    def index(self) -> SentenceIndex:
        """Finds the sentences, which are numbered from 0 through all sets."""
        return SentenceIndex(itertools.chain(*self.sentences.values()), self.min_words)


@dataclass
class _Found:
    """Of one input with D documents: `texts` and `ids` (D,) uint64 hashes, 0 for none; `hits`: document, sentence."""

    texts: np.ndarray
    ids: np.ndarray
    words: int
    hits: list[tuple[int, int]]
    file: dict[str, Any]  # of `input_files`
    skipped: dict[str, Any]


def words_of(text: str) -> list[str]:
    """Words of a text in lower case, the same whether or not it is cut into tokens as in the Penn Treebank."""
    text = text.lower()
    if "b-" in text:
        text = _BRACKET.sub(" ", text)
    if any(splitter in text for splitter in _SPLITTERS):
        text = _SPLIT.sub("", text)
    return _WORD.findall(text)


class SentenceIndex:
    """Finds sentences in paragraphs. Sentences of fewer than `min_words` words are not looked for."""

    def __init__(self, sentences: Iterable[str], min_words: int) -> None:
        self._size = min_words
        self._sentences: dict[int, str] = {}
        self._anchors: dict[tuple[str, ...], list[int]] = {}  # the first words of sentences → their numbers
        for number, sentence in enumerate(sentences):
            words = words_of(sentence)
            if len(words) >= min_words:
                self._sentences[number] = f" {' '.join(words)} "
                self._anchors.setdefault(tuple(words[:min_words]), []).append(number)

    def __len__(self) -> int:
        return len(self._sentences)

    def __contains__(self, number: int) -> bool:
        return number in self._sentences

    def find(self, words: list[str]) -> list[int]:
        """Numbers of the sentences that occur in a paragraph of `words`, ascending."""
        if self._anchors.keys().isdisjoint(self._grams(words)):
            return []
        text = f" {' '.join(words)} "
        numbers = {number for gram in self._grams(words) for number in self._anchors.get(gram, ())}
        return sorted(number for number in numbers if self._sentences[number] in text)

    def _grams(self, words: list[str]) -> Iterator[tuple[str, ...]]:
        return zip(*(words[start:] for start in range(self._size)), strict=False)


def survey(settings: SurveySettings) -> dict[str, Any]:
    """The report of a corpus, which also lists the documents to leave out (`Exclusions` reads it).

    Of documents with equal text, the first in the order of the inputs stays. 16 bytes a document are kept in memory,
    and 65 more while they are compared at the end.

    Inputs that are broken, as in preprocessing, are listed under `failed` with the reason; the rest is a survey of the
    others.

    Raises:
        InputError: for wrong settings, and when no input can be read.
    """
    for name in settings.inputs:
        reader_of(name)
    if repeated_name(map(source_name, settings.inputs)) is not None:
        raise InputError("--input: two inputs have one name (folders do not count); rename one")
    settings.check()
    if settings.min_words < 2:
        raise InputError(f"--min-words {settings.min_words}: must be at least 2")
    outcomes = dict(_all_inputs(settings))
    found = {name: outcome for name, outcome in outcomes.items() if isinstance(outcome, _Found)}
    failed = [{"name": name, "reason": outcome} for name, outcome in outcomes.items() if name not in found]
    if not found:
        raise InputError(f"no input can be read: {'; '.join(entry['reason'] for entry in failed)}")
    names = list(found)
    starts = np.append(0, np.cumsum([len(one.texts) for one in found.values()]))
    twice, original = _repeated(np.concatenate([one.texts for one in found.values()]))
    ids_twice, _ = _repeated(np.concatenate([one.ids for one in found.values()]))

    def place(document: int) -> str:
        number = int(np.searchsorted(starts, document, side="right")) - 1
        return f"{names[number]}: document {document - starts[number]}"

    duplicates = [f"{place(a)} repeats {place(b)}" for a, b in zip(twice[:_EXAMPLES], original, strict=False)]
    inputs = []
    for (name, one), (start, end) in zip(found.items(), itertools.pairwise(starts), strict=True):
        mine = {
            "duplicates": (twice[(twice >= start) & (twice < end)] - start).tolist(),
            "contaminated": sorted({document for document, _ in one.hits}),
        }
        entry = {"name": name, "file": one.file, "documents": len(one.texts), "words": one.words}
        entry |= {"skipped": one.skipped} | {reason: len(documents) for reason, documents in mine.items()}
        exclude = sorted({document for reason in settings.exclude for document in mine[reason]})
        inputs.append(entry | {"exclude": exclude})
    return {
        "format": SURVEY_FORMAT,
        "version": SURVEY_VERSION,
        "documents": int(starts[-1]),
        "words": sum(one.words for one in found.values()),
        "duplicates": {"count": len(twice), "examples": duplicates},
        "duplicate_ids": {"count": len(ids_twice), "examples": [place(a) for a in ids_twice[:_EXAMPLES]]},
        "contamination": _contamination(settings, found),
        "rows_per_document": settings.rows_per_document,
        "line_breaks": settings.line_breaks,
        "excluded_for": list(settings.exclude),
        "failed": failed,
        "inputs": inputs,
    }


def _all_inputs(settings: SurveySettings) -> Iterator[tuple[str, _Found | str]]:
    """What is in each input, or why it cannot be read."""
    with contextlib.ExitStack() as stack:
        if settings.workers == 1:
            results = [partial(_survey_input, name, settings) for name in settings.inputs]
        else:
            pool = stack.enter_context(worker_pool(settings.workers, signal.SIG_DFL))
            results = [pool.submit(_survey_input, name, settings).result for name in settings.inputs]
        for name, result in zip(progress(settings.inputs, unit=" inputs", desc="surveying"), results, strict=True):
            try:
                yield name, result()
            except (InputError, OSError) as error:
                reason = f"{name}: {error}" if isinstance(error, OSError) and not error.filename else str(error)
                print(f"failed: {reason}", file=sys.stderr)
                yield name, reason


def _survey_input(name: str, settings: SurveySettings) -> _Found:
    index, reading = settings.index(), settings.reading()
    texts, ids, words, hits = array("Q"), array("Q"), 0, []
    digest, empty = hashlib.blake2b(digest_size=8), True
    for unit in read_units([name], reading):
        if unit.starts_document:
            if ids:
                texts.append(0 if empty else _number(digest))
            ids.append(0 if unit.document_id is None else _hash(unit.document_id))
            digest, empty = hashlib.blake2b(digest_size=8), True
        if unit.text:
            digest.update(" ".join([*unit.text.lower().split(), ""]).encode())
            empty = False
        in_unit = words_of(unit.text)
        words += len(in_unit)
        hits += [(len(ids) - 1, sentence) for sentence in index.find(in_unit)]
    if ids:
        texts.append(0 if empty else _number(digest))
    (file,) = input_files([name])
    return _Found(np.array(texts, np.uint64), np.array(ids, np.uint64), words, hits, file, reading.skipped.report())


def _hash(text: str) -> int:
    # An id, unlike a text, may hold half of a surrogate pair.
    return _number(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8))


def _number(digest: hashlib.blake2b) -> int:
    return int.from_bytes(digest.digest(), "little")


def _repeated(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the hashes that have occurred before, ascending, and of the first occurrence of each; 0 is no hash."""
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    original = first[inverse]
    again = np.flatnonzero((original != np.arange(len(hashes))) & (hashes != 0))
    return again, original[again]


def _contamination(settings: SurveySettings, found: dict[str, _Found]) -> dict[str, Any]:
    """Per evaluation set: how many of its sentences were looked for and found, and where, for the first few."""
    places: dict[int, str] = {}
    for name, one in found.items():
        for document, sentence in one.hits:
            places.setdefault(sentence, f"{name}: document {document}")
    index, start, result = settings.index(), 0, {}
    for name, sentences in settings.sentences.items():
        numbers = range(start, start + len(sentences))
        start += len(sentences)
        hits = [number for number in numbers if number in places]
        result[name] = {
            "sentences": len(sentences),
            "looked_for": sum(number in index for number in numbers),
            "found": len(hits),
            "examples": [{"sentence": sentences[n - numbers.start], "where": places[n]} for n in hits[:_EXAMPLES]],
        }
    return result
