"""Properties of the toy language that are checked on its text, with word lists but without its grammar."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from toy_words import DETERMINER_NUMBER, NOUN_NUMBER, SUBJECT_NUMBER, VERB_NUMBER

from megatron_sas.toy.language import ROOT, document, to_conllu
from megatron_sas.toy.lexicon import CLASSES, add_s


@pytest.fixture(scope="module")
def sentences() -> list[list[list[str]]]:
    """2,000 sentences, read back from their CoNLL-U: a list of rows of ten columns each."""
    text = "".join(to_conllu(s, "s") for number in range(100) for s in document(3, "test", number))
    return [
        [line.split("\t") for line in block.split("\n") if line[0] != "#"] for block in text.strip("\n").split("\n\n")
    ]


def children(sentence: list[list[str]], row: list[str], relation: str) -> list[list[str]]:
    return [other for other in sentence if other[6] == row[0] and other[7] == relation]


def number_of_predicate(sentence: list[list[str]], row: list[str]) -> str:
    copulas = children(sentence, row, "cop")
    return VERB_NUMBER[copulas[0][1] if copulas else row[1]]


def test_trees(sentences):
    assert len(sentences) == 2000
    crossing = 0
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
        for i, h in heads.items():
            low, high = sorted((i, h))
            crossing += any(not low <= heads[k] <= high for k in range(low + 1, high))
    assert crossing == 0  # projective throughout


def test_subjects_agree(sentences):
    seen = Counter()
    for sentence in sentences:
        by_id = {row[0]: row for row in sentence}
        for row in sentence:
            if row[7] == "nsubj":
                predicate = by_id[row[6]]
                subject = by_id[predicate[6]] if row[1] == "that" else row
                assert SUBJECT_NUMBER[subject[1]] == number_of_predicate(sentence, predicate), sentence
                between = [w[1] for w in sentence[int(subject[0]) : int(predicate[0]) - 1] if w[1] in NOUN_NUMBER]
                attractor = any(NOUN_NUMBER[w] != SUBJECT_NUMBER[subject[1]] for w in between)
                seen[SUBJECT_NUMBER[subject[1]], row[1] == "that", attractor] += 1
    # Both numbers, both kinds of subject, and attractors all occur often.
    assert all(seen[number, False, True] > 100 for number in ("singular", "plural")), seen
    assert all(seen[number, True, False] > 30 for number in ("singular", "plural")), seen


def test_coordinated_verbs_and_determiners_agree(sentences):
    determiners = Counter()
    for sentence in sentences:
        by_id = {row[0]: row for row in sentence}
        for row in sentence:
            if row[7] == "conj" and row[3] == "VERB" and not children(sentence, row, "nsubj"):
                assert VERB_NUMBER[row[1]] == number_of_predicate(sentence, by_id[row[6]])
            if row[7] == "det":
                noun = by_id[row[6]]
                assert DETERMINER_NUMBER.get(row[1], NOUN_NUMBER[noun[1]]) == NOUN_NUMBER[noun[1]]
                determiners[row[1]] += 1
                if row[1] in ("a", "an"):
                    following = sentence[int(row[0])][1]
                    assert (row[1] == "an") == (following[0] in "aeiou")
    assert set(DETERMINER_NUMBER) <= set(determiners)


def test_selection(sentences):
    """Adjectives fit their noun and verbs their object in all but the few cases that ignore selection."""
    noun_class = {}
    for name, entry in CLASSES.items():
        for stem in entry.nouns.split():
            noun_class[stem] = noun_class[add_s(stem)] = name
    fits = Counter()
    for sentence in sentences:
        by_id = {row[0]: row for row in sentence}
        for row in sentence:
            head = by_id.get(row[6])
            if row[7] == "amod":
                fits["amod", row[1] in CLASSES[noun_class[head[1]]].adjectives.split()] += 1
            if row[7] == "obj" and row[1] in noun_class:
                wanted = {o for e in CLASSES.values() for o, verbs in e.objects.items() if head[2] in verbs.split()}
                if wanted:
                    fits["obj", noun_class[row[1]] in wanted] += 1
    assert fits["amod", False] == 0
    assert 0.85 < fits["obj", True] / (fits["obj", True] + fits["obj", False]) < 1


def test_relations_forms_and_text(sentences):
    relations = Counter(row[7] for sentence in sentences for row in sentence)
    names = "root punct nsubj obj iobj obl nmod case det amod advmod cop acl:relcl mark ccomp conj cc"
    assert sorted(relations) == sorted(names.split())
    assert min(relations.values()) >= 100
    lengths = [len(sentence) for sentence in sentences]
    assert 8 < sum(lengths) / len(lengths) < 13 and max(lengths) < 100
    block = to_conllu(document(3, "test", 0)[0], "name")
    assert block.startswith("# sent_id = name\n# text = ") and block.endswith("\n\n") and not block.endswith("\n\n\n")
    rebuilt = "".join(
        row[1] + ("" if row[9] == "SpaceAfter=No" else " ")
        for row in (line.split("\t") for line in block.split("\n") if re.match(r"\d", line))
    )
    assert rebuilt.strip() == block.split("\n")[1].removeprefix("# text = ")


def test_documents_are_pure_functions():
    def texts(*args: object) -> list[str]:
        return [sentence.text for sentence in document(*args)]

    assert texts(0, "train", 5) == texts(0, "train", 5)
    assert len({tuple(texts(*args)) for args in [(0, "train", 5), (1, "train", 5), (0, "x", 5), (0, "train", 6)]}) == 4
    assert all(sentence.heads.count(ROOT) == 1 for sentence in document(0, "train", 5))
