"""The lexicon of the toy language: forms, spelling, vocabulary."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import pytest
from toy_words import DETERMINER_NUMBER, NOUN_NUMBER, VERBS
from transformers import BertTokenizer

from megatron_sas.toy.language import document, to_conllu
from megatron_sas.toy.lexicon import CLASSES, PREPOSITIONS, add_s, lexicon


@pytest.fixture(scope="module")
def sentences() -> list[list[list[str]]]:
    """2,000 sentences, read back from their CoNLL-U: a list of rows of ten columns each."""
    text = "".join(to_conllu(s, "s") for number in range(100) for s in document(3, "test", number))
    return [
        [line.split("\t") for line in block.split("\n") if line[0] != "#"] for block in text.strip("\n").split("\n\n")
    ]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> BertTokenizer:
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text("\n".join(lexicon().vocabulary) + "\n")
    return BertTokenizer(str(path))


def test_forms_are_unique():
    forms = [*(f for v in VERBS for f in (v, add_s(v))), *NOUN_NUMBER, *PREPOSITIONS, *DETERMINER_NUMBER, "that", "and"]
    forms += [w for e in CLASSES.values() for w in f"{e.adjectives} {e.adverbs}".split()]
    assert [form for form, count in Counter(forms).items() if count > 1] == []
    stems = [w for e in CLASSES.values() for w in e.nouns.split()]
    stems += [v for e in CLASSES.values() for verbs in (e.intransitive, *e.objects.values()) for v in verbs.split()]
    assert len(set(stems)) == len(stems)


@pytest.mark.parametrize(
    ("stem", "form"),
    [("dog", "dogs"), ("bus", "buses"), ("daisy", "daisies"), ("monkey", "monkeys"), ("crash", "crashes")],
)
def test_spelling(stem, form):
    assert add_s(stem) == form


def test_vocabulary(tokenizer, sentences):
    vocabulary = lexicon().vocabulary
    assert vocabulary[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert len(set(vocabulary)) == len(vocabulary)
    pieces = [tokenizer.tokenize(row[1]) for sentence in sentences for row in sentence]
    assert not any("[UNK]" in p for p in pieces)
    assert 0.02 < sum(len(p) > 1 for p in pieces) / len(pieces) < 0.15  # alignment has something to align


def test_words_know_whether_their_forms_are_cut_alike(tokenizer):
    words = lexicon()
    pairs = [*chain.from_iterable((*words.nouns, *words.intransitive)), *words.complement, *words.ditransitive]
    pairs += [forms for group in words.transitive for forms, _ in group]
    for one, many in pairs:
        assert one.other is many and many.other is one
        assert one.even == many.even == (len(tokenizer.tokenize(one.form)) == len(tokenizer.tokenize(many.form)))
    assert {one.even for one, _ in pairs} == {True, False}
