"""Stanza's documents → parses, on objects with the attributes of `stanza.Document`; and what is said without Stanza."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest

from megatron_sas.cli import InputError
from megatron_sas.data.parses import RelationNames, describe_parser
from megatron_sas.data.stanza_parser import parse_of


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


@pytest.mark.skipif(importlib.util.find_spec("stanza") is not None, reason="Stanza is installed")
def test_without_stanza():
    with pytest.raises(InputError, match="stanza:en: Stanza is not installed; pip install stanza"):
        describe_parser("stanza:en")
