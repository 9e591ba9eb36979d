"""Minimal pairs of the toy language in BLiMP's file format: the bad sentence has one word in the wrong number.

Both sentences of a pair have the same number of WordPieces (words whose two forms are cut differently are not used as
the critical word), singular and plural alternate, and where there is an attractor, a noun between the subject and its
verb, it always has the other number, so that the nearest noun never helps.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Container
from typing import Any

from megatron_sas.toy.language import (
    BARE_FRAMES,
    COPULAR,
    INTRANSITIVE,
    MAX_DEPTH,
    TRANSITIVE,
    Grammar,
    Sentence,
    text_of,
)
from megatron_sas.toy.lexicon import Word

# Builds a sentence of the given number and returns the position of its critical word.
Builder = Callable[[Grammar, Sentence, int], int]


def _subject(grammar: Grammar, out: Sentence, noun_class: int, number: int) -> int:
    return grammar.simple_noun_phrase(out, noun_class, number)


def _finish(grammar: Grammar, out: Sentence, subject: int, noun_class: int, number: int, frame: int) -> int:
    """Append the predicate and the full stop; returns the position of the word that agrees with the subject."""
    verb = grammar.predicate(out, frame, noun_class, number, MAX_DEPTH)
    out.attach(subject, verb, "nsubj")
    out.add_under(grammar.lexicon.period, verb, "punct")
    return verb if out.words[verb].number is not None else verb - 1  # `is`, `are` stand right before the adjective


def _simple(grammar: Grammar, out: Sentence, number: int) -> int:
    noun_class = grammar.any_class()
    subject = _subject(grammar, out, noun_class, number)
    return _finish(grammar, out, subject, noun_class, number, grammar.pick(BARE_FRAMES))


def _prepositional(frame: int) -> Builder:
    def build(grammar: Grammar, out: Sentence, number: int) -> int:
        noun_class = grammar.any_class()
        subject = _subject(grammar, out, noun_class, number)
        word, classes = grammar.pick(grammar.tables.prepositions)
        case = out.add(word)
        attractor = grammar.simple_noun_phrase(out, classes[grammar.rand() < 0.5], 1 - number)
        out.attach(case, attractor, "case")
        out.attach(attractor, subject, "nmod")
        return _finish(grammar, out, subject, noun_class, number, frame)

    return build


def _subject_relative(grammar: Grammar, out: Sentence, number: int) -> int:
    noun_class = grammar.any_class()
    subject = _subject(grammar, out, noun_class, number)
    _transitive_relative(grammar, out, subject, noun_class, number)
    return _finish(grammar, out, subject, noun_class, number, grammar.pick(BARE_FRAMES))


def _object_relative(grammar: Grammar, out: Sentence, number: int) -> int:
    noun_class = grammar.any_class()
    subject = _subject(grammar, out, noun_class, number)
    grammar.object_relative(out, subject, noun_class, MAX_DEPTH, number=1 - number)
    return _finish(grammar, out, subject, noun_class, number, grammar.pick(BARE_FRAMES))


def _inside_subject_relative(grammar: Grammar, out: Sentence, number: int) -> int:
    noun_class = grammar.any_class()
    subject = _subject(grammar, out, noun_class, number)
    critical = _transitive_relative(grammar, out, subject, noun_class, number)
    _finish(grammar, out, subject, noun_class, number, INTRANSITIVE)
    return critical


def _inside_object_relative(grammar: Grammar, out: Sentence, number: int) -> int:
    """The verb of the relative clause agrees with its own subject, not with the noun that it modifies."""
    noun_class = grammar.any_class()
    subject = _subject(grammar, out, noun_class, 1 - number)
    critical = grammar.object_relative(out, subject, noun_class, MAX_DEPTH, number=number)
    _finish(grammar, out, subject, noun_class, 1 - number, INTRANSITIVE)
    return critical


def _transitive_relative(grammar: Grammar, out: Sentence, noun: int, noun_class: int, number: int) -> int:
    """Append `that` + verb + an object of the other number; returns the position of the verb."""
    relative = out.add(grammar.lexicon.that_relative)
    forms, object_class = grammar.pick(grammar.tables.transitive[noun_class])
    verb = out.add(forms[number])
    out.attach(relative, verb, "nsubj")
    out.attach(verb, noun, "acl:relcl")
    out.attach(grammar.simple_noun_phrase(out, object_class, 1 - number), verb, "obj")
    return verb


def _determiner(critical: str, adjectives: int) -> Builder:
    """A determiner that shows number, `adjectives` adjectives and a noun, as object; `critical` is `noun` or `det`."""

    def build(grammar: Grammar, out: Sentence, number: int) -> int:
        noun_class = grammar.any_class()
        subject = _subject(grammar, out, noun_class, subject_number := grammar.number())
        forms, object_class = grammar.pick(grammar.tables.transitive[noun_class])
        verb = out.add(forms[subject_number])
        out.attach(subject, verb, "nsubj")
        # `a` is left out: before another noun it might have to be `an`.
        pairs = [pair for pair in grammar.tables.determiners.items if pair[0].other and pair[0].form != "a"]
        determiner: Word = pairs[int(grammar.rand() * len(pairs))][number]
        noun = grammar.simple_noun_phrase(out, object_class, number, determiner, adjectives)
        out.attach(noun, verb, "obj")
        out.add_under(grammar.lexicon.period, verb, "punct")
        return noun if critical == "noun" else noun - 1 - adjectives

    return build


AGREEMENT, DETERMINER = "subject_verb_agreement", "determiner_noun_agreement"
# UID → linguistics_term, builder. The order of rows is the order of the files.
SETS: dict[str, tuple[str, Builder]] = {
    "toy_subject_verb_agreement": (AGREEMENT, _simple),
    "toy_subject_verb_agreement_prepositional_attractor": (AGREEMENT, _prepositional(TRANSITIVE)),
    "toy_copula_agreement_prepositional_attractor": (AGREEMENT, _prepositional(COPULAR)),
    "toy_subject_verb_agreement_subject_relative": (AGREEMENT, _subject_relative),
    "toy_subject_verb_agreement_object_relative": (AGREEMENT, _object_relative),
    "toy_agreement_inside_subject_relative": (AGREEMENT, _inside_subject_relative),
    "toy_agreement_inside_object_relative": (AGREEMENT, _inside_object_relative),
    "toy_determiner_noun_agreement_1": (DETERMINER, _determiner("noun", 0)),
    "toy_determiner_noun_agreement_2": (DETERMINER, _determiner("det", 0)),
    "toy_determiner_noun_agreement_with_adjective_1": (DETERMINER, _determiner("noun", 1)),
    "toy_determiner_noun_agreement_with_adjective_2": (DETERMINER, _determiner("det", 1)),
}


def minimal_pairs(uid: str, count: int, seed: int, seen: Container[str] = ()) -> list[dict[str, Any]]:
    """`count` different pairs of the set `uid` as the records of a BLiMP file; the grammatical ones alternate in
    number.

    Args:
        seen: texts of the training sentences; a pair of which either sentence is there is not used.
    """
    term, build = SETS[uid]
    grammar = Grammar(random.Random(f"{seed} pairs {uid}").random)
    records: list[dict[str, Any]] = []
    used: set[str] = set()
    while len(records) < count:
        sentence = Sentence()
        critical = build(grammar, sentence, len(records) % 2)
        word = sentence.words[critical]
        if word.other is None or not word.even:
            continue
        good = [word.form for word in sentence.words]
        bad = [*good[:critical], word.other.form, *good[critical + 1 :]]
        texts = text_of(good), text_of(bad)
        if texts[0] in used or texts[0] in seen or texts[1] in seen:
            continue
        used.add(texts[0])
        records.append(
            {
                "sentence_good": texts[0],
                "sentence_bad": texts[1],
                "one_prefix_prefix": text_of(good[:critical]),
                "one_prefix_word_good": word.form,
                "one_prefix_word_bad": word.other.form,
                "field": "morphology",
                "linguistics_term": term,
                "UID": uid,
                "simple_LM_method": True,
                "one_prefix_method": True,
                "two_prefix_method": False,
                "lexically_identical": False,
                "pairID": str(len(records)),
            }
        )
    return records
