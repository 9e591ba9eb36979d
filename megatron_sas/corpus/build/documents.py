"""Which documents of the inputs are used: one side of a train/validation split, without excluded ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_sas.core.cli import InputError
from megatron_sas.corpus.readers.base import Unit
from megatron_sas.corpus.readers.line_breaks import LineBreaks
from megatron_sas.corpus.readers.registry import source_name

SURVEY_FORMAT = "megatron_sas corpus survey"
SURVEY_VERSION = 3
KEY_CHARACTERS = 1 << 20  # what a document's split depends on, and so what of it is held in memory
Split = Literal["train", "validation"]


def unit_text(unit: Unit) -> str:
    """A unit's text, "" for a document without any."""
    if unit.content is None:
        return ""
    return unit.content if isinstance(unit.content, str) else unit.content.text


def text_as_read(document: Iterable[Unit]) -> str:
    """The text of a document, whatever `--line-breaks` made of its lines, so that it stays on its side of a split."""
    return "\n".join(
        unit_text(unit) if unit.as_read is None else unit.as_read for unit in document if unit.as_read != ""
    )


def is_validation(text: str, share: float, key_characters: int = KEY_CHARACTERS) -> bool:
    """Whether a document that begins with `text` (at least `key_characters`, or all) belongs to the validation side."""
    digest = hashlib.blake2b(text[:key_characters].encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < share * 2**64


def input_of(unit: Unit) -> str:
    """The name of the input that a unit comes from."""
    return unit.where.rpartition(":")[0]


@dataclass
class Exclusions:
    """Documents to leave out, by input and number (from 0) in it, as listed by tools/survey_corpus.py."""

    documents: dict[str, int]  # how many documents each input had
    excluded: dict[str, frozenset[int]]

    @staticmethod
    def read(
        path: str,
        inputs: list[str],
        files: list[dict[str, Any]],
        rows_per_document: int | None = None,
        line_breaks: LineBreaks = "auto",
    ) -> Exclusions:
        """The part of a survey that concerns `inputs`; they are matched by `source_name`.

        Args:
            files: their `input_files`, which must be those that were surveyed.
            rows_per_document, line_breaks: what a document is, which must be what it was for the survey.

        Raises:
            InputError: no survey, one that does not contain all inputs, or one of other files or versions of datasets
                of these names, or of other documents.
        """
        names = list(map(source_name, inputs))
        double = next((name for number, name in enumerate(names) if name in names[:number]), None)
        if double is not None:
            raise InputError(f"--exclude: two inputs are called {double} (folders do not count); rename one")
        try:
            survey = json.loads(Path(path).read_text(encoding="utf-8"))
            if survey["format"] != SURVEY_FORMAT:
                raise ValueError("another format")
            if survey["version"] != SURVEY_VERSION:
                raise ValueError(
                    f"format version {survey['version']}, this program reads {SURVEY_VERSION}; run it again"
                )
            if (rows := survey.get("rows_per_document")) != rows_per_document:
                raise InputError(
                    f"{path}: its documents are others: --rows-per-document was {rows} and is now {rows_per_document}; "
                    "run tools/survey_corpus.py again"
                )
            if rows is not None and (lines := survey.get("line_breaks", "paragraph")) != line_breaks:
                raise InputError(
                    f"{path}: its documents are others: --line-breaks was {lines} and is now {line_breaks}, which "
                    "decides what a row is; run tools/survey_corpus.py again"
                )
            entries = {source_name(entry["name"]): entry for entry in survey["inputs"]}
            failed = {source_name(entry["name"]) for entry in survey.get("failed", [])}
            missing = [name for name in inputs if source_name(name) not in entries]
            if missing and source_name(missing[0]) in failed:
                raise InputError(
                    f"{missing[0]}: was surveyed in {path}, but could not be read; mend it and survey all inputs again"
                )
            if missing:
                raise InputError(f"{path}: does not contain {missing[0]}; survey all inputs in one go")
            found = {name: entries[source_name(name)] for name in inputs}
            for (name, entry), file in zip(found.items(), files, strict=True):
                if entry["file"] != file:
                    raise InputError(
                        f"{name}: is not the {entry['name']} that was surveyed in {path} (SHA-256 or revision differ); "
                        "run tools/survey_corpus.py again"
                    )
            return Exclusions(
                {name: int(entry["documents"]) for name, entry in found.items()},
                {name: frozenset(map(int, entry["exclude"])) for name, entry in found.items()},
            )
        except FileNotFoundError:
            raise InputError(f"{path}: no such file; make it with tools/survey_corpus.py") from None
        except InputError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: not a survey by tools/survey_corpus.py ({error})") from error


@dataclass
class Selection:
    """Which documents to use, and how many were not: `other_split`, `excluded`."""

    split: Split | None = None
    validation_share: float = 0.0
    exclusions: Exclusions | None = None
    key_characters: int = KEY_CHARACTERS
    counts: dict[str, int] = field(default_factory=lambda: {"other_split": 0, "excluded": 0})

    def apply(self, units: Iterable[Unit]) -> Iterator[Unit]:
        """The units of the selected documents, in order; no more than `key_characters` are held back at a time.

        Raises:
            InputError: an input has another number of documents than when the exclusions were made.
        """
        if self.split is None and self.exclusions is None:
            yield from units
            return
        numbers: dict[str, int] = {}
        held: list[Unit] = []  # the beginning of a document that is not decided yet
        size, decision = 0, None
        for unit in units:
            if unit.starts_document:
                if held and self._is_selected(held):
                    yield from held
                number = numbers[input_of(unit)] = numbers.get(input_of(unit), -1) + 1
                held, size, decision = [], 0, None
                if self._is_excluded(input_of(unit), number):
                    decision = False
                    self.counts["excluded"] += 1
                elif self.split is None:
                    decision = True
            if decision is None:
                held.append(unit)
                size += len(unit_text(unit))
                if size >= self.key_characters:
                    decision = self._is_selected(held)
                    if decision:
                        yield from held
                    held = []
            elif decision:
                yield unit
        if held and self._is_selected(held):
            yield from held
        for name, count in (self.exclusions.documents if self.exclusions else {}).items():
            if numbers.get(name, -1) + 1 != count:
                raise InputError(
                    f"{name}: {numbers.get(name, -1) + 1} documents, but {count} when it was surveyed; run "
                    "tools/survey_corpus.py again with the same --text-field and --on-error"
                )

    def _is_excluded(self, name: str, number: int) -> bool:
        return self.exclusions is not None and number in self.exclusions.excluded[name]

    def _is_selected(self, document: list[Unit]) -> bool:
        validation = is_validation(text_as_read(document), self.validation_share, self.key_characters)
        if validation == (self.split == "validation"):
            return True
        self.counts["other_split"] += 1
        return False
