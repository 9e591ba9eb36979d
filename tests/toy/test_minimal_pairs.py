"""Minimal pairs of the toy language differ in one word, and in nothing else that a model could go by."""

from __future__ import annotations

import pytest

from megatron_sas.toy.language import CONSONANTS, STEMS, VOWELS, text_of
from megatron_sas.toy.minimal_pairs import SETS, minimal_pairs

CLASS_OF = {stem: kind for kind, parts in STEMS.items() for stems in parts.values() for stem in stems}
UPOS_OF = {stem: upos for parts in STEMS.values() for upos, stems in parts.items() for stem in stems}


def split(word: str) -> tuple[str, str]:
    """Stem and consonant."""
    assert word[-2] in CONSONANTS and word[-1] == VOWELS[UPOS_OF[word[:-2]]]
    return word[:-2], word[-2]


@pytest.mark.parametrize("uid", SETS)
def test_minimal_pairs(uid):
    first = minimal_pairs(uid, 200, 0)
    assert first == minimal_pairs(uid, 200, 0)
    seen = {first[0]["sentence_good"], first[7]["sentence_bad"]}
    records = minimal_pairs(uid, 200, 0, seen)
    assert len({record["sentence_good"] for record in records}) == 200
    upos = ("VERB", "NOUN") if "verb" in uid else ("ADJ", "NOUN")
    for i, record in enumerate(records):
        assert record["UID"] == uid and record["pairID"] == str(i)
        good, bad = record["sentence_good"], record["sentence_bad"]
        assert good not in seen and bad not in seen
        words_good, words_bad = (text.split() for text in (good, bad))
        (k,) = [j for j, pair in enumerate(zip(words_good, words_bad, strict=True)) if pair[0] != pair[1]]
        assert (words_good[k], words_bad[k]) == (record["one_prefix_word_good"], record["one_prefix_word_bad"])
        assert text_of(words_good[:k]) == record["one_prefix_prefix"]
        (stem, end), (wrong_stem, wrong_end) = split(words_good[k]), split(words_bad[k])
        assert UPOS_OF[stem] == UPOS_OF[wrong_stem] == upos[uid.endswith("_2")]
        others = [split(word) for j, word in enumerate(words_good) if j != k]
        (partner,) = [other for other, last in others if last == end]
        assert UPOS_OF[partner] == upos[not uid.endswith("_2")]
        nouns = [(CLASS_OF[other], last) for other, last in others if UPOS_OF[other] == "NOUN" and last != end]
        if "agreement" in uid:
            assert stem == wrong_stem and wrong_end in {last for _, last in nouns}
        else:
            assert end == wrong_end and CLASS_OF[stem] == CLASS_OF[partner] != CLASS_OF[wrong_stem]
            assert CLASS_OF[wrong_stem] in {kind for kind, _ in nouns}
