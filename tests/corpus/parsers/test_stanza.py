"""Stanza's documents → parses, on objects with the attributes of `stanza.Document`; and what is said without Stanza.

`StanzaParser` runs on a small module in the place of Stanza: that shows what we ask of it, not that Stanza does it.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import shutil
import sys
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pytest

from megatron_sas.core.cli import InputError
from megatron_sas.corpus.build.workers import Worker, WorkerSettings
from megatron_sas.corpus.parsers.base import RelationNames
from megatron_sas.corpus.parsers.registry import describe_parser, make_parser
from megatron_sas.corpus.parsers.stanza import PROCESSORS, parse_of
from megatron_sas.data.tokenizer import load_tokenizer


def token(start, text, *words):
    words = [SimpleNamespace(text=form, head=head, deprel=relation) for form, head, relation in words]
    return SimpleNamespace(text=text, start_char=start, end_char=start + len(text), words=words)


def test_words_sentences_and_multiword_tokens():
    """ "I can't go. Al banco!": "can't" is spelled by its words, "Al" (A el) is not."""
    first = [
        token(0, "I", ("I", 4, "nsubj")),
        token(2, "can't", ("ca", 4, "aux"), ("n't", 4, "advmod")),
        token(8, "go", ("go", 0, "root")),
        token(10, ".", (".", 4, "punct")),
    ]
    second = [token(12, "Al", ("A", 3, "case"), ("el", 3, "det")), token(15, "banco", ("banco", 0, "root"))]
    names = RelationNames()
    parse = parse_of(SimpleNamespace(sentences=[SimpleNamespace(tokens=t) for t in (first, second)]), names)
    spans = [(0, 1), (2, 4), (4, 7), (8, 10), (10, 11), (12, 14), (14, 14), (15, 20)]
    assert list(zip(parse.starts.tolist(), parse.ends.tolist(), strict=True)) == spans
    assert parse.heads.tolist() == [3, 3, 3, -1, 3, 7, 7, -1]
    relations = ["nsubj", "aux", "advmod", "root", "punct", "case", "det", "root"]
    assert [names.names[number] for number in parse.relations] == relations
    assert parse.sentence_starts.tolist() == [True, *[False] * 4, True, False, False]
    empty = parse_of(SimpleNamespace(sentences=[]), names)
    assert len(empty.starts) == len(empty.heads) == 0


class _Pipeline:
    """Takes the arguments of `stanza.Pipeline`; parses every word as the dependent of the one before."""

    made: ClassVar = []

    def __init__(self, lang, dir, processors, download_method, verbose):
        self.made.append((lang, dir, processors, download_method))
        self.batches = []

    def bulk_process(self, documents):
        self.batches.append([document.text for document in documents])
        for document in documents:
            words, start = [], 0
            for head, form in enumerate(document.text.split()):
                start = document.text.index(form, start)
                words.append(token(start, form, (form, head, "dep" if head else "root")))
                start += len(form)
            document.sentences = [SimpleNamespace(tokens=words)] if words else []
        return documents


class _Document:
    def __init__(self, sentences, text=None):
        self.sentences, self.text = sentences, text


@pytest.fixture
def stanza(tmp_path, monkeypatch):
    """A module with the names of Stanza that the project uses; its models are said to lie in `tmp_path`."""
    modules = {name: ModuleType(name) for name in ("stanza", "stanza.resources", "stanza.resources.common")}
    for name, module in modules.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    modules["stanza"].Pipeline, modules["stanza"].Document = type("Pipeline", (_Pipeline,), {"made": []}), _Document
    modules["stanza.resources.common"].DEFAULT_MODEL_DIR = "/nowhere"
    monkeypatch.setenv("STANZA_RESOURCES_DIR", str(tmp_path))
    metadata = tmp_path / "site" / "stanza-1.0.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: stanza\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(metadata.parents[1])
    return modules["stanza"]


def test_what_is_asked_of_stanza(stanza, tmp_path):
    with pytest.raises(InputError, match=r"--parser stanza:en: no parser in .*/en; .*stanza.download\('en'\)"):
        describe_parser("stanza:en")
    (tmp_path / "en" / "depparse").mkdir(parents=True)
    assert describe_parser("stanza:en") == {
        "name": "stanza:en",
        "version": "1.0",
        "sha256": hashlib.sha256(b"").hexdigest(),
    }
    parser, names = make_parser("stanza:en"), RelationNames()
    assert stanza.Pipeline.made == [("en", str(tmp_path), PROCESSORS, None)]  # None: nothing is downloaded
    texts = ["The cat sat", "", "It runs"]
    parses = list(parser.parse(texts, [None] * 3, names))
    assert parser._pipeline.batches == [texts]  # one call for all of them
    assert [parse.heads.tolist() for parse in parses] == [[-1, 0, 1], [], [-1, 0]]
    assert [list(zip(parse.starts, parse.ends, strict=True)) for parse in parses][2] == [(0, 2), (3, 7)]
    assert names.names == ["", "root", "dep"]


def test_other_models_are_another_parser(stanza, tmp_path, monkeypatch):
    """Those of the processors that are used, and what these need; wherever they lie."""
    for name in ("depparse/combined_charlm.pt", "forward_charlm/1billion.pt", "ner/ontonotes.pt"):
        (tmp_path / "en" / name).parent.mkdir(parents=True)
        (tmp_path / "en" / name).write_text(name)
    first = describe_parser("stanza:en")
    (tmp_path / "en" / "ner" / "ontonotes.pt").write_text("other")
    assert describe_parser("stanza:en") == first
    monkeypatch.setenv("STANZA_RESOURCES_DIR", str(shutil.copytree(tmp_path / "en", tmp_path / "host" / "en").parent))
    assert describe_parser("stanza:en") == first
    (tmp_path / "host" / "en" / "forward_charlm" / "1billion.pt").write_text("other")
    assert describe_parser("stanza:en")["sha256"] != first["sha256"]


def test_from_text_to_packed_data_with_stanza_in_the_middle(stanza, tmp_path, vocab_file):
    (tmp_path / "en" / "depparse").mkdir(parents=True)
    result = Worker(WorkerSettings(load_tokenizer(vocab_file).backend_tokenizer.to_str(), "stanza:en", 16, 1))(
        ["the cats sat", None, "dog run"]
    )
    assert result.cuts.tolist() == [0, 4, 4, 6] and result.counts["words"] == 5
    assert result.streams[1].tolist() == [0, -1, 0, -2, 0, -1]


@pytest.mark.skipif(importlib.util.find_spec("stanza") is not None, reason="Stanza is installed")
def test_without_stanza():
    with pytest.raises(InputError, match="stanza:en: Stanza is not installed; pip install stanza"):
        describe_parser("stanza:en")
