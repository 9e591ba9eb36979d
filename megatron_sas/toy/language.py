"""A seeded artificial language with free word order, concord and gold trees in the manner of Universal Dependencies.

A sentence is a verb with its subject and three objects, each with an adjective, in any order. Syntax shows in two
ways only. Words that belong together have endings with the same consonant ("dogka furryki": the vowel is that of the
part of speech), and they fit together ("furry" goes with animals, "thorny" with plants). An ending is a WordPiece of
its own. So a masked stem can be narrowed down by looking for the other word with its consonant, and by nothing less:
classes are drawn independently, so that the words of a sentence say little about one of them; order is free, so that
no fixed distance helps; and endings that belong together are different pieces, so that equal pieces need not attract
each other. A model therefore gains nothing for a while, and then much at once.

Randomness: `random.Random(text).random()` is the one generator whose values the Python documentation promises to keep
across versions. Each document has a generator of its own, seeded by (seed, split, number), so that a document does
not depend on how many others there are or on which process makes it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

SENTENCES_PER_DOCUMENT = 20  # even, and all sentences are equally long: packed sequences hold whole sentences
NOUNS_PER_SENTENCE = 4
MISFITS = 0.03  # share of verbs and adjectives of a random class
ROOT = -1  # head of the root, in 0-based word positions
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

# Class → part of speech → stems. No stem followed by an ending begins with a longer stem.
STEMS: dict[str, dict[str, tuple[str, ...]]] = {
    "person": {"NOUN": ("king", "baker", "poet"), "ADJ": ("honest", "clever"), "VERB": ("thanks", "greets")},
    "animal": {"NOUN": ("dog", "horse", "rabbit"), "ADJ": ("furry", "hungry"), "VERB": ("chases", "sniffs")},
    "plant": {"NOUN": ("rose", "oak", "willow"), "ADJ": ("thorny", "leafy"), "VERB": ("shades", "entwines")},
    "machine": {"NOUN": ("truck", "clock", "robot"), "ADJ": ("rusty", "noisy"), "VERB": ("crushes", "lifts")},
}
CLASSES = tuple(STEMS)
CONSONANTS = "bdfghklmnprstvwz"  # an ending is one of these, shared by words that belong together …
VOWELS = {"NOUN": "a", "ADJ": "i", "VERB": "o"}  # … and a vowel


class Word(NamedTuple):
    """A word in its sentence. `head` is a 0-based word position or `ROOT`."""

    stem: str
    consonant: str
    kind: str  # the class of its stem
    upos: str
    head: int
    relation: str

    @property
    def ending(self) -> str:
        """Consonant and vowel."""
        return self.consonant + VOWELS[self.upos]

    @property
    def form(self) -> str:
        """The word as written."""
        return self.stem + self.ending


class Sentence(tuple[Word, ...]):
    """The words of a sentence, in order."""

    @property
    def text(self) -> str:
        """The sentence as written."""
        return text_of([word.form for word in self])


def text_of(forms: Sequence[str]) -> str:
    """Join word forms with blanks. There is no punctuation: attention that looks for nothing would rest on it."""
    return " ".join(forms)


def pick(rand: Callable[[], float], items: Sequence[Any]) -> Any:
    """An item, evenly; `rand` returns floats in [0, 1)."""
    return items[int(rand() * len(items))]


def shuffled(rand: Callable[[], float], items: Sequence[Any]) -> list[Any]:
    """The items in random order."""
    return [item for _, item in sorted((rand(), i, item)[::2] for i, item in enumerate(items))]


class Grammar:
    """The grammar over one stream of random numbers.

    Args:
        rand: returns floats in [0, 1), e.g. `random.Random(text).random`.
    """

    def __init__(self, rand: Callable[[], float]) -> None:
        self.rand = rand
        self._consonants: list[str] = []

    def sentence(self) -> Sentence:
        """A new random sentence. A consonant is not used again before all others have been."""
        if not self._consonants:
            self._consonants = shuffled(self.rand, CONSONANTS)
        pairs = []  # the verb and its subject, then adjectives and their nouns
        for i in range(NOUNS_PER_SENTENCE):
            kind, consonant = pick(self.rand, CLASSES), self._consonants.pop()
            fitting = kind if self.rand() >= MISFITS else pick(self.rand, CLASSES)
            pairs += [self.word(fitting, consonant, "ADJ" if i else "VERB"), self.word(kind, consonant, "NOUN")]
        return arranged(pairs, shuffled(self.rand, range(len(pairs))))

    def word(self, kind: str, consonant: str, upos: str) -> Word:
        """A word of this class; it has no place in a tree yet."""
        return Word(pick(self.rand, STEMS[kind][upos]), consonant, kind, upos, ROOT, "root")


def arranged(pairs: Sequence[Word], order: Sequence[int]) -> Sentence:
    """The words of `pairs`, each modifier before its noun and the verb first of all, in this order, with their tree.

    The nouns that are not the subject are one coordinated object, whose head is the first of them.
    """
    place = {old: new for new, old in enumerate(order)}
    sentence = [pairs[i] for i in order]
    verb = place[0]
    others = sorted(place[i] for i in range(3, len(pairs), 2))
    for i, word in enumerate(pairs):
        if i % 2 and i > 1:
            edge = (verb, "obj") if place[i] == others[0] else (others[0], "conj")
        else:
            edge = (ROOT, "root") if i == 0 else (verb, "nsubj") if i == 1 else (place[i + 1], "amod")
        sentence[place[i]] = word._replace(head=edge[0], relation=edge[1])
    return Sentence(sentence)


def document(seed: int, split: str, number: int) -> list[Sentence]:
    """Document `number` of `split`: `SENTENCES_PER_DOCUMENT` sentences, a pure function of the arguments."""
    grammar = Grammar(random.Random(f"{seed} {split} {number}").random)
    return [grammar.sentence() for _ in range(SENTENCES_PER_DOCUMENT)]


def to_conllu(sentence: Sentence, name: str) -> str:
    """A sentence as a CoNLL-U block with `# sent_id` and `# text`, ending in an empty line."""
    lines = [f"# sent_id = {name}\n# text = {sentence.text}"]
    for i, word in enumerate(sentence, 1):
        concord = f"Concord={word.consonant.upper()}"
        columns = (i, word.form, word.stem, word.upos, "_", concord, word.head + 1, word.relation, "_", "_")
        lines.append("\t".join(map(str, columns)))
    return "\n".join(lines) + "\n\n"


def vocabulary() -> list[str]:
    """BERT's special tokens, stems, and endings as continuations."""
    stems = [stem for kinds in STEMS.values() for group in kinds.values() for stem in group]
    return [*SPECIAL_TOKENS, *stems, *(f"##{c}{v}" for v in VOWELS.values() for c in CONSONANTS)]
