"""Minimal pairs of the toy language differ in one word, and in nothing else that a model could go by."""

from __future__ import annotations

import re

import pytest
from toy_words import DETERMINER_NUMBER, NOUN_NUMBER, VERB_NUMBER
from transformers import BertTokenizer

from megatron_sas.toy.language import text_of
from megatron_sas.toy.lexicon import lexicon
from megatron_sas.toy.minimal_pairs import SETS, minimal_pairs


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> BertTokenizer:
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text("\n".join(lexicon().vocabulary) + "\n")
    return BertTokenizer(str(path))


@pytest.mark.parametrize("uid", SETS)
def test_minimal_pairs(uid, tokenizer):
    first = minimal_pairs(uid, 200, 0)
    assert first == minimal_pairs(uid, 200, 0)
    seen = {first[0]["sentence_good"], first[7]["sentence_bad"]}
    records = minimal_pairs(uid, 200, 0, seen)
    critical_numbers = []
    for i, record in enumerate(records):
        assert record["UID"] == uid and record["pairID"] == str(i)
        good, bad = record["sentence_good"], record["sentence_bad"]
        assert good not in seen and bad not in seen
        words_good, words_bad = (re.findall(r"[a-z]+|[.,]", text) for text in (good, bad))
        (k,) = [j for j, pair in enumerate(zip(words_good, words_bad, strict=True)) if pair[0] != pair[1]]
        assert (words_good[k], words_bad[k]) == (record["one_prefix_word_good"], record["one_prefix_word_bad"])
        assert text_of(words_good[:k]) == record["one_prefix_prefix"]
        assert len(tokenizer.tokenize(good)) == len(tokenizer.tokenize(bad))
        numbers = VERB_NUMBER | NOUN_NUMBER | DETERMINER_NUMBER
        assert {numbers[words_good[k]], numbers[words_bad[k]]} == {"singular", "plural"}
        critical_numbers.append(numbers[words_good[k]])
    assert critical_numbers.count("singular") == 100
    assert len({record["sentence_good"] for record in records}) == 200


def test_attractors_have_the_other_number():
    for uid in SETS:
        if "attractor" in uid or (uid.endswith("_relative") and "inside" not in uid):
            for record in minimal_pairs(uid, 50, 1):
                prefix = record["one_prefix_prefix"].split()
                subject, *between = [NOUN_NUMBER[word] for word in prefix if word in NOUN_NUMBER]
                assert subject == VERB_NUMBER[record["one_prefix_word_good"]]
                assert between and set(between) == {VERB_NUMBER[record["one_prefix_word_bad"]]}
