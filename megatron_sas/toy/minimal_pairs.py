"""Minimal pairs of the toy language in BLiMP's file format: the bad sentence has one word with a wrong ending or stem.

The wrong consonant, or the class of the wrong stem, is that of another noun of the sentence. So both words of a pair
suit the sentence, and only the word that they belong to tells which is right.
"""

from __future__ import annotations

import random
from collections.abc import Container
from typing import Any, NamedTuple

from megatron_sas.toy.language import STEMS, Grammar, Word, pick, text_of


class PairSet(NamedTuple):
    """What differs: the ending or the stem of a verb or of its subject, of an adjective or of its noun."""

    term: str
    relation: str  # of the dependent in the edge that is broken
    of_head: bool  # the head of the edge differs, else its dependent
    ending: bool  # the ending differs, else the stem


AGREEMENT, SELECTION = "agreement", "selection"
# UID → set. The order of rows is the order of the files.
SETS: dict[str, PairSet] = {
    "toy_subject_verb_agreement_1": PairSet(AGREEMENT, "nsubj", of_head=True, ending=True),
    "toy_subject_verb_agreement_2": PairSet(AGREEMENT, "nsubj", of_head=False, ending=True),
    "toy_adjective_noun_agreement_1": PairSet(AGREEMENT, "amod", of_head=False, ending=True),
    "toy_adjective_noun_agreement_2": PairSet(AGREEMENT, "amod", of_head=True, ending=True),
    "toy_subject_verb_selection_1": PairSet(SELECTION, "nsubj", of_head=True, ending=False),
    "toy_subject_verb_selection_2": PairSet(SELECTION, "nsubj", of_head=False, ending=False),
    "toy_adjective_noun_selection_1": PairSet(SELECTION, "amod", of_head=False, ending=False),
    "toy_adjective_noun_selection_2": PairSet(SELECTION, "amod", of_head=True, ending=False),
}


def _broken(grammar: Grammar, kind: PairSet) -> tuple[list[Word], int, Word] | None:
    """A sentence, the position of a word in it, and what is wrong there; None if the sentence drawn does not serve."""
    sentence = grammar.sentence()
    edges = [(i, word.head) for i, word in enumerate(sentence) if word.relation == kind.relation]
    dependent, head = pick(grammar.rand, edges)
    here = head if kind.of_head else dependent
    noun = sentence[head if kind.relation == "amod" else dependent]
    other = pick(grammar.rand, [w for w in sentence if w.upos == "NOUN" and w is not noun])
    word = sentence[here]
    if kind.ending:
        return sentence, here, word._replace(consonant=other.consonant)
    if sentence[dependent].kind != sentence[head].kind or other.kind == noun.kind:
        return None
    return sentence, here, word._replace(stem=pick(grammar.rand, STEMS[other.kind][word.upos]))


def minimal_pairs(uid: str, count: int, seed: int, seen: Container[str] = ()) -> list[dict[str, Any]]:
    """`count` different pairs of the set `uid` as the records of a BLiMP file.

    Args:
        seen: texts of the training sentences; a pair of which either sentence is there is not used.
    """
    kind = SETS[uid]
    grammar = Grammar(random.Random(f"{seed} pairs {uid}").random)
    records: list[dict[str, Any]] = []
    used: set[str] = set()
    while len(records) < count:
        found = _broken(grammar, kind)
        if found is None:
            continue
        sentence, here, wrong = found
        good = [word.form for word in sentence]
        texts = text_of(good), text_of([*good[:here], wrong.form, *good[here + 1 :]])
        if texts[0] in used or texts[0] in seen or texts[1] in seen:
            continue
        used.add(texts[0])
        records.append(
            {
                "sentence_good": texts[0],
                "sentence_bad": texts[1],
                "one_prefix_prefix": text_of(good[:here]),
                "one_prefix_word_good": good[here],
                "one_prefix_word_bad": wrong.form,
                "field": "syntax" if kind.term == SELECTION else "morphology",
                "linguistics_term": kind.term,
                "UID": uid,
                "simple_LM_method": True,
                "one_prefix_method": True,
                "two_prefix_method": False,
                "lexically_identical": False,
                "pairID": str(len(records)),
            }
        )
    return records
