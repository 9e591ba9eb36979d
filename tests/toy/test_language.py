"""Properties of the toy language, checked on its text as it is read back from CoNLL-U."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from transformers import BertTokenizer

from megatron_sas.toy.language import CONSONANTS, ROOT, STEMS, VOWELS, document, to_conllu, vocabulary

CLASS_OF = {stem: kind for kind, parts in STEMS.items() for stems in parts.values() for stem in stems}
UPOS_OF = {stem: upos for parts in STEMS.values() for upos, stems in parts.items() for stem in stems}


@pytest.fixture(scope="module")
def sentences() -> list[list[list[str]]]:
    """2,000 sentences, read back from their CoNLL-U: a list of rows of ten columns each."""
    text = "".join(to_conllu(s, "s") for number in range(100) for s in document(3, "test", number))
    return [
        [line.split("\t") for line in block.split("\n") if line[0] != "#"] for block in text.strip("\n").split("\n\n")
    ]


def consonant(row: list[str]) -> str:
    ending = row[1].removeprefix(row[2])
    assert ending[0] in CONSONANTS and ending[1:] == VOWELS[row[3]]
    return ending[0]


def test_trees(sentences):
    assert len(sentences) == 2000
    for sentence in sentences:
        heads = {int(row[0]): int(row[6]) for row in sentence}
        assert list(heads) == list(range(1, len(sentence) + 1))
        assert sum(head == 0 for head in heads.values()) == 1
        for row in sentence:
            assert len(row) == 10 and all(row)
            assert (row[7] == "root") == (row[6] == "0")
            word, steps = int(row[0]), 0
            while word:
                word, steps = heads[word], steps + 1
                assert steps <= len(sentence)
    relations = Counter(row[7] for sentence in sentences for row in sentence)
    assert relations == Counter(dict.fromkeys(("root", "nsubj", "obj"), 2000), conj=4000, amod=6000)


def test_words_that_belong_together_share_a_consonant_that_no_other_word_has(sentences):
    for sentence in sentences:
        by_id = {row[0]: row for row in sentence}
        for row in sentence:
            if row[7] in ("nsubj", "amod"):
                assert consonant(row) == consonant(by_id[row[6]])
        assert sorted(Counter(consonant(row) for row in sentence).values()) == [2, 2, 2, 2]


def test_consecutive_sentences_share_no_consonant(sentences):
    """Two at a time, as they are packed together."""
    for first, second in zip(sentences[::2], sentences[1::2], strict=True):
        assert len({consonant(row) for row in first + second}) == 8


def test_selection(sentences):
    """Verbs fit their subject and adjectives their noun in all but the few cases that ignore selection."""
    fits = Counter()
    for sentence in sentences:
        by_id = {row[0]: row for row in sentence}
        for row in sentence:
            assert UPOS_OF[row[2]] == row[3]
            if row[7] in ("nsubj", "amod"):
                fits[row[7], CLASS_OF[row[2]] == CLASS_OF[by_id[row[6]][2]]] += 1
    for relation in ("nsubj", "amod"):
        assert 0.01 < fits[relation, False] / (fits[relation, True] + fits[relation, False]) < 0.04


def test_neither_order_nor_other_words_give_a_class_away(sentences):
    """No fixed distance finds heads, and the classes of a sentence's other nouns say nothing of that of a noun."""
    distances, alike = Counter(), Counter()
    for sentence in sentences:
        distances.update(int(row[6]) - int(row[0]) for row in sentence if row[7] in ("nsubj", "amod"))
        kinds = [CLASS_OF[row[2]] for row in sentence if row[3] == "NOUN"]
        alike.update(first == second for i, first in enumerate(kinds) for second in kinds[i + 1 :])
    assert max(distances.values()) < 0.15 * sum(distances.values())
    assert 0.23 < alike[True] / sum(alike.values()) < 0.27


def test_text_is_that_of_the_rows(sentences):
    block = to_conllu(document(3, "test", 0)[0], "name")
    assert block.startswith("# sent_id = name\n# text = ") and block.endswith("\n\n") and not block.endswith("\n\n\n")
    rebuilt = " ".join(line.split("\t")[1] for line in block.split("\n") if re.match(r"\d", line))
    assert rebuilt == block.split("\n")[1].removeprefix("# text = ")


def test_documents_are_pure_functions():
    def texts(*args: object) -> list[str]:
        return [sentence.text for sentence in document(*args)]

    assert texts(0, "train", 5) == texts(0, "train", 5)
    assert len({tuple(texts(*args)) for args in [(0, "train", 5), (1, "train", 5), (0, "x", 5), (0, "train", 6)]}) == 4
    assert all([word.head for word in sentence].count(ROOT) == 1 for sentence in document(0, "train", 5))


def test_every_word_is_cut_into_stem_and_ending(tmp_path):
    assert vocabulary()[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert len(set(vocabulary())) == len(vocabulary()) == 5 + len(CLASS_OF) + len(CONSONANTS) * len(VOWELS)
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary()) + "\n")
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
    for stem, upos in UPOS_OF.items():
        for first in CONSONANTS:
            ending = first + VOWELS[upos]
            assert tokenizer.tokenize(stem + ending) == [stem, f"##{ending}"]
