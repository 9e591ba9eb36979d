"""A seeded generator of an English-like language with gold dependency trees in the manner of Universal Dependencies.

The language is regular enough to be learned in minutes and structured enough that a masked language model gains by
attending along dependencies: verbs agree with their subject across prepositional phrases and relative clauses,
determiners agree with their noun, and adjectives, verbs, adverbs and prepositions select the class of the word they
belong to (see `toy_lexicon`).

Randomness: `random.Random(text).random()` is the one generator whose values the Python documentation promises to keep
across versions. Each document has a generator of its own, seeded by (seed, split, number), so that a document does
not depend on how many others there are or on which process makes it.
"""

from __future__ import annotations

import functools
import random
from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

from megatron_sas.toy.lexicon import (
    CLASS_NAMES,
    DITRANSITIVE_OBJECTS,
    PLURAL,
    SINGULAR,
    Forms,
    Lexicon,
    Word,
    lexicon,
)

SENTENCES_PER_DOCUMENT = 20
ZIPF_SHIFT = 0.0  # P(rank r) ∝ 1 / (r + shift), r = 1, 2, …
MISMATCH = 0.02  # share of nouns that ignore what their head selects
MAX_DEPTH = 3  # clauses and noun phrases inside one another

ROOT = -1  # head of the root, in 0-based word positions


@dataclass(slots=True)
class Sentence:
    """Words with their heads (0-based word positions, `ROOT` for the root) and Universal Dependencies relations."""

    words: list[Word] = field(default_factory=list)
    heads: list[int] = field(default_factory=list)
    relations: list[str] = field(default_factory=list)

    def add(self, word: Word) -> int:
        """Append a word whose head is not known yet; returns its position."""
        self.words.append(word)
        self.heads.append(ROOT)
        self.relations.append("root")
        return len(self.words) - 1

    def attach(self, dependent: int, head: int, relation: str) -> None:
        """Make `dependent` depend on `head`."""
        self.heads[dependent] = head
        self.relations[dependent] = relation

    def add_under(self, word: Word, head: int, relation: str) -> int:
        """Append a word that depends on the word at `head`, which may still be to come; returns its position."""
        self.words.append(word)
        self.heads.append(head)
        self.relations.append(relation)
        return len(self.words) - 1

    @property
    def text(self) -> str:
        """The sentence as written: no space before a comma or the full stop."""
        return text_of([word.form for word in self.words])


def text_of(forms: Sequence[str]) -> str:
    """Join word forms with blanks, except before punctuation."""
    return " ".join(forms).replace(" ,", ",").replace(" .", ".")


class Table(NamedTuple):
    """Items with cumulative weights, for sampling."""

    items: list[Any]
    cumulative: list[float]

    @staticmethod
    def weighted(items: Sequence[Any], weights: Sequence[float]) -> Table:
        """A table in which `items[i]` has probability `weights[i] / sum(weights)`."""
        return Table(list(items), list(accumulate(weights)))

    @staticmethod
    def zipf(items: Sequence[Any]) -> Table:
        """A table in which the item of rank r = 1, 2, … has a probability proportional to 1 / (r + `ZIPF_SHIFT`)."""
        return Table.weighted(items, [1 / (rank + ZIPF_SHIFT) for rank in range(1, len(items) + 1)])

    def weights(self) -> list[float]:
        """The weight of each item."""
        return [high - low for low, high in zip([0.0, *self.cumulative], self.cumulative, strict=False)]


INTRANSITIVE, TRANSITIVE, DITRANSITIVE, COPULAR, COMPLEMENT = range(5)
FRAMES = Table.weighted(range(5), (0.24, 0.42, 0.06, 0.20, 0.08))
BARE_FRAMES = Table.weighted((INTRANSITIVE, TRANSITIVE), (0.3, 0.7))  # inside relative clauses and coordinations


class Grammar:
    """The grammar over one stream of random numbers; `sentence` makes the next sentence.

    Args:
        rand: returns floats in [0, 1), e.g. `random.Random(text).random`.
    """

    def __init__(self, rand: Callable[[], float]) -> None:
        self.rand = rand
        self.tables = tables()
        self.lexicon = self.tables.lexicon

    def pick(self, table: Table) -> Any:
        """A random item of `table`."""
        cumulative = table.cumulative
        return table.items[bisect(cumulative, self.rand() * cumulative[-1], 0, len(cumulative) - 1)]

    def number(self) -> int:
        """SINGULAR or PLURAL, evenly."""
        return PLURAL if self.rand() < 0.5 else SINGULAR

    def any_class(self) -> int:
        """A class index, evenly."""
        return int(self.rand() * len(self.tables.nouns))

    def sentence(self) -> Sentence:
        """A new random sentence."""
        out = Sentence()
        root = self.clause(out, depth=0)
        if self.rand() < 0.08:
            self.conjoin(out, root, lambda: self.clause(out, depth=1))
        out.add_under(self.lexicon.period, root, "punct")
        return out

    def conjoin(self, out: Sentence, first: int, second: Callable[[], int]) -> None:
        """Append `and` and a second conjunct, made by `second`, to the conjunct at `first`."""
        conjunction = out.add(self.lexicon.conjunction)
        conjunct = second()
        out.attach(conjunction, conjunct, "cc")
        out.attach(conjunct, first, "conj")

    def clause(self, out: Sentence, depth: int) -> int:
        """Append a clause with its subject; returns the position of its predicate."""
        rand, tables = self.rand, self.tables
        frame = self.pick(FRAMES if depth < MAX_DEPTH else BARE_FRAMES)
        of_person = frame in (DITRANSITIVE, COMPLEMENT)
        subject_class = tables.person if of_person else self.any_class()
        number = self.number()
        fronted: list[int] = []
        if rand() < 0.06:
            fronted = [self.prepositional(out, depth + 1), out.add(self.lexicon.comma)]
        if rand() < 0.12:
            subject = out.add(self.pick(tables.pronouns)[number])
        else:
            subject = self.noun_phrase(out, subject_class, number, depth + 1)
        predicate = self.predicate(out, frame, subject_class, number, depth)
        out.attach(subject, predicate, "nsubj")
        if fronted:
            out.attach(fronted[0], predicate, "obl")
            out.attach(fronted[1], predicate, "punct")
        if rand() < 0.06:
            frame = self.pick(BARE_FRAMES)
            self.conjoin(out, predicate, lambda: self.predicate(out, frame, subject_class, number, depth + 1))
        return predicate

    def predicate(self, out: Sentence, frame: int, subject_class: int, number: int, depth: int) -> int:
        """Append a verb (or `is`, `are` and an adjective) with what follows it; returns its position."""
        tables = self.tables
        if frame == COPULAR:
            copula = out.add(self.lexicon.copula[number])
            predicate = out.add(self.pick(tables.adjectives[subject_class]))
            out.attach(copula, predicate, "cop")
            return predicate
        adverb = out.add(self.pick(tables.adverbs[subject_class])) if self.rand() < 0.1 else None
        if frame == TRANSITIVE:
            forms, object_class = self.pick(tables.transitive[subject_class])
        else:
            forms = self.pick(
                tables.intransitive[subject_class]
                if frame == INTRANSITIVE
                else tables.ditransitive
                if frame == DITRANSITIVE
                else tables.complement
            )
        predicate = out.add(forms[number])
        if adverb is not None:
            out.attach(adverb, predicate, "advmod")
        if frame == TRANSITIVE:
            out.attach(self.objects(out, object_class, depth + 1), predicate, "obj")
        elif frame == DITRANSITIVE:
            out.attach(self.noun_phrase(out, tables.person, self.number(), MAX_DEPTH), predicate, "iobj")
            kinds = tables.ditransitive_objects
            object_class = kinds[int(self.rand() * len(kinds))]
            out.attach(self.noun_phrase(out, object_class, self.number(), depth + 1), predicate, "obj")
        elif frame == COMPLEMENT:
            mark = out.add(self.lexicon.that_complementiser)
            content = self.clause(out, depth + 1)
            out.attach(mark, content, "mark")
            out.attach(content, predicate, "ccomp")
            return predicate  # anything more would seem to belong to the inner clause
        if self.rand() < 0.12:
            out.add_under(self.pick(tables.adverbs[subject_class]), predicate, "advmod")
        if self.rand() < (0.2 if frame == INTRANSITIVE else 0.06):
            out.attach(self.prepositional(out, depth + 1), predicate, "obl")
        return predicate

    def objects(self, out: Sentence, noun_class: int, depth: int) -> int:
        """Append an object, sometimes of two coordinated noun phrases; returns the position of its head."""
        head = self.noun_phrase(out, noun_class, self.number(), depth)
        if self.rand() < 0.05:
            self.conjoin(out, head, lambda: self.noun_phrase(out, noun_class, self.number(), MAX_DEPTH))
        return head

    def prepositional(self, out: Sentence, depth: int) -> int:
        """Append a preposition and its noun phrase; returns the position of the noun, which has yet to be attached."""
        word, classes = self.pick(self.tables.prepositions)
        case = out.add(word)
        noun = self.noun_phrase(out, classes[self.rand() < 0.5], self.number(), depth)
        out.attach(case, noun, "case")
        return noun

    def noun_phrase(self, out: Sentence, noun_class: int, number: int, depth: int) -> int:
        """Append determiner, adjectives, noun and what modifies it; returns the position of the noun."""
        rand = self.rand
        if rand() < MISMATCH:
            noun_class = self.any_class()
        noun = self.simple_noun_phrase(out, noun_class, number)
        if depth < MAX_DEPTH:
            u = rand()
            if u < 0.13:
                out.attach(self.prepositional(out, depth + 1), noun, "nmod")
            elif u < 0.19:
                self.subject_relative(out, noun, noun_class, number, depth + 1)
            elif u < 0.25:
                self.object_relative(out, noun, noun_class, depth + 1)
        return noun

    def simple_noun_phrase(
        self, out: Sentence, noun_class: int, number: int, determiner: Word | None = None, adjectives: int | None = None
    ) -> int:
        """Append determiner, adjectives and noun, with a given determiner and number of adjectives if not None."""
        tables = self.tables
        first = out.add(determiner or self.pick(tables.determiners)[number])
        if adjectives is None:
            u = self.rand()
            adjectives = 0 if u > 0.45 else 1 if u > 0.08 else 2
        for _ in range(adjectives):
            out.add(self.pick(tables.adjectives[noun_class]))
        noun = out.add(self.pick(tables.nouns[noun_class])[number])
        words = out.words
        if words[first].form == "a" and words[first + 1].form[0] in "aeiou":
            words[first] = self.lexicon.an
        out.attach(first, noun, "det")
        for position in range(first + 1, noun):
            out.attach(position, noun, "amod")
        return noun

    def subject_relative(self, out: Sentence, noun: int, noun_class: int, number: int, depth: int) -> int:
        """Append `that` + predicate, the noun being its subject; returns the position of the predicate."""
        relative = out.add(self.lexicon.that_relative)
        predicate = self.predicate(out, self.pick(BARE_FRAMES), noun_class, number, depth)
        out.attach(relative, predicate, "nsubj")
        out.attach(predicate, noun, "acl:relcl")
        return predicate

    def object_relative(self, out: Sentence, noun: int, noun_class: int, depth: int, number: int | None = None) -> int:
        """Append `that` + subject + verb, the noun being its object; returns the position of the verb."""
        relative = out.add(self.lexicon.that_relative)
        forms, subject_class = self.pick(self.tables.transitive_by_object[noun_class])
        number = self.number() if number is None else number
        subject = self.noun_phrase(out, subject_class, number, depth + 1)
        predicate = out.add(forms[number])
        out.attach(relative, predicate, "obj")
        out.attach(subject, predicate, "nsubj")
        out.attach(predicate, noun, "acl:relcl")
        return predicate


@dataclass(frozen=True)
class Tables:
    """Sampling tables over the lexicon; lists are by class index."""

    lexicon: Lexicon
    person: int
    nouns: list[Table]
    adjectives: list[Table]
    adverbs: list[Table]
    intransitive: list[Table]
    transitive: list[Table]
    transitive_by_object: list[Table]
    ditransitive: Table
    complement: Table
    prepositions: Table
    determiners: Table
    pronouns: Table
    ditransitive_objects: list[int]


@functools.cache
def tables() -> Tables:
    """The sampling tables, made once."""
    words = lexicon()
    names = list(CLASS_NAMES)
    pairs, weights = zip(*words.determiners, strict=True)
    transitive = [Table.zipf(group) for group in words.transitive]
    by_object: list[list[tuple[tuple[Forms, int], float]]] = [[] for _ in names]
    for subject_class, table in enumerate(transitive):
        for (forms, object_class), weight in zip(table.items, table.weights(), strict=True):
            by_object[object_class].append(((forms, subject_class), weight))
    return Tables(
        lexicon=words,
        person=names.index("person"),
        nouns=[Table.zipf(group) for group in words.nouns],
        adjectives=[Table.zipf(group) for group in words.adjectives],
        adverbs=[Table.zipf(group) for group in words.adverbs],
        intransitive=[Table.zipf(group) for group in words.intransitive],
        transitive=transitive,
        transitive_by_object=[Table.weighted(*zip(*group, strict=True)) for group in by_object],
        ditransitive=Table.zipf(words.ditransitive),
        complement=Table.zipf(words.complement),
        prepositions=Table.zipf(words.prepositions),
        determiners=Table.weighted(pairs, weights),
        pronouns=Table.zipf(words.pronouns),
        ditransitive_objects=[names.index(name) for name in DITRANSITIVE_OBJECTS],
    )


def document(seed: int, split: str, number: int) -> list[Sentence]:
    """Document `number` of `split`: `SENTENCES_PER_DOCUMENT` sentences, a pure function of the arguments."""
    grammar = Grammar(random.Random(f"{seed} {split} {number}").random)
    return [grammar.sentence() for _ in range(SENTENCES_PER_DOCUMENT)]


def to_conllu(sentence: Sentence, name: str) -> str:
    """A sentence as a CoNLL-U block with `# sent_id` and `# text`, ending in an empty line."""
    words = sentence.words
    last = len(words) - 1
    lines = [f"# sent_id = {name}\n# text = {sentence.text}"]
    for i, (word, head, relation) in enumerate(zip(words, sentence.heads, sentence.relations, strict=True)):
        # No blank before punctuation, and none to speak of after the last word.
        misc = "SpaceAfter=No" if i < last and words[i + 1].upos == "PUNCT" else "_"
        lines.append(f"{i + 1}\t{word.columns}\t{head + 1}\t{relation}\t_\t{misc}")
    lines.append("\n")
    return "\n".join(lines)
