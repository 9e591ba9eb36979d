"""Stanza's dependency parser over paragraphs, on a GPU if there is one. Stanza is imported only when it is used."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sas.core.cli import InputError
from megatron_sas.core.files import sha256_files
from megatron_sas.corpus.parsers.base import Parse, Parser, RelationNames
from megatron_sas.corpus.readers.trees import word_spans

if TYPE_CHECKING:
    from tokenizers import Encoding

PROCESSORS = "tokenize,mwt,pos,lemma,depparse"
_FILES = (*PROCESSORS.split(","), "pretrain", "forward_charlm", "backward_charlm")  # their folders, and what they need


def _models() -> Path:
    from stanza.resources.common import DEFAULT_MODEL_DIR

    return Path(os.environ.get("STANZA_RESOURCES_DIR", DEFAULT_MODEL_DIR))


class StanzaParser(Parser):
    """Parses with Universal Dependencies; a multiword token's words share its characters (see `word_spans`)."""

    argument = "LANGUAGE"

    def __init__(self, language: str) -> None:
        import stanza

        self._new = lambda text: stanza.Document([], text=text)
        self._pipeline = stanza.Pipeline(
            language,
            dir=str(_models()),
            processors=PROCESSORS,
            download_method=None,  # nothing is fetched behind the user's back
            verbose=False,
        )

    @staticmethod
    def describe(language: str) -> dict[str, str]:
        """Name, version and SHA-256 (see `Parser`).

        The SHA-256 is of all models of the processors that are there: which of several are loaded only Stanza knows.
        """
        if importlib.util.find_spec("stanza") is None:
            raise InputError(f"--parser stanza:{language}: Stanza is not installed; pip install stanza")
        folder = _models() / language
        if not (folder / "depparse").is_dir():
            raise InputError(
                f"--parser stanza:{language}: no parser in {folder}; "
                f"python -c \"import stanza; stanza.download('{language}')\""
            )
        return {
            "name": f"stanza:{language}",
            "version": importlib.metadata.version("stanza"),
            "sha256": sha256_files(folder, _FILES),
        }

    def parse(self, contents: list[str], encodings: list[Encoding], names: RelationNames) -> Iterator[Parse]:
        """Parses of the paragraphs (see `Parser`)."""
        for document in self._pipeline.bulk_process([self._new(content) for content in contents]):
            yield parse_of(document, names)


def parse_of(document: Any, names: RelationNames) -> Parse:
    """A `stanza.Document` as a `Parse`."""
    spans, heads, relations, starts = [], [], [], []
    for sentence in document.sentences:
        first = len(spans)
        for token in sentence.tokens:
            spans += word_spans([word.text for word in token.words], token.text, token.start_char, token.end_char)
            heads += [first + word.head - 1 if word.head else -1 for word in token.words]
            relations += [names.number(word.deprel) for word in token.words]
        starts += [place == first for place in range(first, len(spans))]
    return Parse.of_words(spans, heads, relations, starts)
