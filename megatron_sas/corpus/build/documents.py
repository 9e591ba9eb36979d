"""Which documents of the inputs are used: one side of a train/validation split, without excluded ones."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_sas.core.cli import InputError
from megatron_sas.corpus.readers.base import ReadSettings, Unit
from megatron_sas.corpus.readers.registry import repeated_name, source_name
from megatron_sas.data.packed import read_header

SURVEY_FORMAT = "megatron_sas corpus survey"
SURVEY_VERSION = 3
KEY_CHARACTERS = 1 << 20  # what a document's split depends on, and so what of it is held in memory
Split = Literal["train", "validation"]


def text_as_read(document: Iterable[Unit]) -> str:
    """The text of a document, whatever `--line-breaks` made of its lines, so that it stays on its side of a split."""
    return "\n".join(unit.text if unit.as_read is None else unit.as_read for unit in document if unit.as_read != "")


def is_validation(text: str, share: float, key_characters: int = KEY_CHARACTERS) -> bool:
    """Whether a document that begins with `text` (at least `key_characters`, or all) belongs to the validation side."""
    digest = hashlib.blake2b(text[:key_characters].encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < share * 2**64


@dataclass
class Exclusions:
    """Documents to leave out, by input and number (from 0) in it, as listed by tools/survey_corpus.py."""

    documents: dict[str, int]  # how many documents each input had
    excluded: dict[str, frozenset[int]]

    @staticmethod
    def read(
        path: str, inputs: list[str], files: list[dict[str, Any]], settings: ReadSettings | None = None
    ) -> Exclusions:
        """The part of a survey that concerns `inputs`; they are matched by `source_name`.

        Args:
            files: their `input_files`, which must be those that were surveyed.
            settings: how they are read; what a document is must be what it was for the survey.

        Raises:
            InputError: no survey, one that does not contain all inputs, or one of other files or versions of datasets
                of these names, or of other documents.
        """
        if (double := repeated_name(map(source_name, inputs))) is not None:
            raise InputError(f"--exclude: two inputs are called {double} (folders do not count); rename one")
        survey = read_header(path, "make it with tools/survey_corpus.py")
        try:
            if survey["format"] != SURVEY_FORMAT:
                raise ValueError("another format")
            if survey["version"] != SURVEY_VERSION:
                raise ValueError(
                    f"format version {survey['version']}, this program reads {SURVEY_VERSION}; run it again"
                )
            _check_same_documents(path, survey, settings or ReadSettings())
            entries = {source_name(entry["name"]): entry for entry in survey["inputs"]}
            failed = {source_name(entry["name"]) for entry in survey.get("failed", [])}
            result = Exclusions({}, {})
            for name, file in zip(inputs, files, strict=True):
                entry = entries.get(source_name(name))
                if entry is None:
                    raise InputError(
                        f"{name}: was surveyed in {path}, but could not be read; mend it and survey all inputs again"
                        if source_name(name) in failed
                        else f"{path}: does not contain {name}; survey all inputs in one go"
                    )
                if entry["file"] != file:
                    raise InputError(
                        f"{name}: is not the {entry['name']} that was surveyed in {path} (SHA-256 or revision differ); "
                        "run tools/survey_corpus.py again"
                    )
                result.documents[name] = int(entry["documents"])
                result.excluded[name] = frozenset(map(int, entry["exclude"]))
            return result
        except InputError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: not a survey by tools/survey_corpus.py ({error})") from error


def _check_same_documents(path: str, survey: dict[str, Any], settings: ReadSettings) -> None:
    """Raise `InputError` where rows make other documents than they made for the survey."""
    rows, lines = survey.get("rows_per_document"), survey.get("line_breaks", "paragraph")
    if rows != settings.rows_per_document:
        changed = f"--rows-per-document was {rows} and is now {settings.rows_per_document}"
    elif rows is not None and lines != settings.line_breaks:
        changed = f"--line-breaks was {lines} and is now {settings.line_breaks}, which decides what a row is"
    else:
        return
    raise InputError(f"{path}: its documents are others: {changed}; run tools/survey_corpus.py again")


@dataclass
class Selection:
    """Which documents to use; `counts` has how many were not: `documents_of_other_split`, `documents_excluded`."""

    split: Split | None = None
    validation_share: float = 0.0
    exclusions: Exclusions | None = None
    key_characters: int = KEY_CHARACTERS
    counts: Counter[str] = field(default_factory=Counter)

    def apply(self, units: Iterable[Unit]) -> Iterator[Unit]:
        """The units of the selected documents, in order; no more than `key_characters` are held back at a time.

        Raises:
            InputError: an input has another number of documents than when the exclusions were made.
        """
        if self.split is None and self.exclusions is None:
            yield from units
            return
        seen: Counter[str] = Counter()  # documents of each input
        for document in _documents(units):
            first = next(document)
            number = seen[first.input]
            seen[first.input] += 1
            if self.exclusions and number in self.exclusions.excluded[first.input]:
                self.counts["documents_excluded"] += 1
            else:
                yield from self._of_split(first, document)
        for name, count in (self.exclusions.documents if self.exclusions else {}).items():
            if seen[name] != count:
                raise InputError(
                    f"{name}: {seen[name]} documents, but {count} when it was surveyed; run "
                    "tools/survey_corpus.py again with the same --text-field and --on-error"
                )

    def _of_split(self, first: Unit, rest: Iterator[Unit]) -> Iterator[Unit]:
        """The document, if it is on our side of the split."""
        beginning, size = [first], len(first.text)
        if self.split is not None:
            while size < self.key_characters and (unit := next(rest, None)) is not None:
                beginning.append(unit)
                size += len(unit.text)
            validation = is_validation(text_as_read(beginning), self.validation_share, self.key_characters)
            if validation != (self.split == "validation"):
                self.counts["documents_of_other_split"] += 1
                return
        yield from beginning
        yield from rest


def _documents(units: Iterable[Unit]) -> Iterator[Iterator[Unit]]:
    """The units of each document, to be taken before the next."""
    current = 0

    def number_of(unit: Unit) -> int:
        nonlocal current
        current += unit.starts_document
        return current

    return (document for _, document in itertools.groupby(units, number_of))
