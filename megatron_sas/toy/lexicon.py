"""Words of the toy language: eight classes of things, what can be said of each, and how the words are spelled and cut.

Selection is what makes syntax pay for a language model: an adjective, a verb or an adverb fits the words of one class
only, so whoever knows which word a masked word depends on, and nothing less, can narrow it down. The classes therefore
belong to the edges of a tree, not to a sentence: the subject and the object of a verb are of different classes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import NamedTuple

SINGULAR, PLURAL = 0, 1
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class WordClass(NamedTuple):
    """One class of things: its nouns, and the words that select it. `objects` maps a class to the verbs that take it
    as object."""

    nouns: str
    adjectives: str
    adverbs: str
    intransitive: str
    objects: dict[str, str]


# Lists are in order of frequency. No inflected form occurs twice (tested), so a form determines its word.
CLASSES: dict[str, WordClass] = {
    "person": WordClass(
        "doctor teacher farmer baker lawyer sailor soldier singer painter writer dancer merchant astronaut poet",
        "clever honest polite lazy famous humble",
        "happily sadly eagerly",
        "laugh smile complain hesitate apologize",
        {"instrument": "play tune borrow purchase", "food": "cook taste serve chop"},
    ),
    "animal": WordClass(
        "dog cat horse cow goat rabbit tiger lion zebra camel donkey leopard gorilla kangaroo",
        "furry hungry tame wild fierce ferocious",
        "wildly silently fearlessly",
        "growl yawn bark howl crouch",
        {"plant": "nibble trample sniff chew", "person": "chase follow bite frighten"},
    ),
    "plant": WordClass(
        "tree rose tulip fern oak maple willow orchid daisy shrub vine marigold sycamore daffodil",
        "leafy thorny fragrant evergreen withered barren",
        "slowly gradually seasonally",
        "grow wilt sprout wither ripen",
        {"building": "cover surround overgrow adorn", "animal": "feed shelter poison attract"},
    ),
    "food": WordClass(
        "apple carrot onion sandwich biscuit pancake lemon sausage burger muffin noodle dumpling omelette casserole",
        "salty ripe spicy stale crunchy greasy",
        "quickly thoroughly unevenly",
        "rot melt sizzle spoil crumble",
        {"person": "delight please sicken disgust", "tool": "stain clog coat smear"},
    ),
    "tool": WordClass(
        "hammer shovel ladder drill bucket needle kettle lantern pencil basket mirror screwdriver wheelbarrow "
        "calculator",
        "rusty sturdy dusty blunt heavy magnetic",
        "suddenly abruptly repeatedly",
        "break rattle snap glow jam",
        {"vehicle": "dent fasten scrape stabilize", "food": "cut slice crush peel"},
    ),
    "vehicle": WordClass(
        "truck bus tractor scooter wagon tram ferry canoe yacht rocket van ambulance locomotive bulldozer",
        "speedy noisy electric crowded armored streamlined",
        "smoothly dangerously sharply",
        "crash accelerate swerve skid depart",
        {"building": "reach pass approach ram", "plant": "flatten avoid scatter splash"},
    ),
    "building": WordClass(
        "house tower castle church hotel library theater museum temple cottage barn lighthouse cathedral skyscraper",
        "ancient spacious gloomy majestic vacant towering",
        "visibly officially permanently",
        "close burn collapse reopen decay",
        {"vehicle": "block guard enclose obscure", "instrument": "display store exhibit preserve"},
    ),
    "instrument": WordClass(
        "violin piano guitar trumpet flute cello drum harp clarinet banjo trombone tambourine harmonica harpsichord",
        "loud shrill acoustic muted vintage lacquered",
        "softly loudly beautifully",
        "resonate squeak hum clang jingle",
        {"animal": "scare calm soothe awaken", "tool": "outshine resemble drown imitate"},
    ),
}
CLASS_NAMES: tuple[str, ...] = tuple(CLASSES)

# Verbs whose subject is a person, and that take a clause ("she says that …") or a person and a thing.
COMPLEMENT_VERBS = "say think know believe claim hope suspect insist"
DITRANSITIVE_VERBS = "give send lend offer hand promise"
DITRANSITIVE_OBJECTS = ("food", "tool", "instrument")
# Each preposition takes nouns of two classes.
PREPOSITIONS: dict[str, tuple[str, str]] = {
    "near": ("building", "plant"),
    "with": ("tool", "instrument"),
    "behind": ("vehicle", "animal"),
    "beside": ("person", "plant"),
    "inside": ("building", "vehicle"),
    "without": ("food", "tool"),
    "like": ("animal", "person"),
    "among": ("instrument", "food"),
}
# (singular, plural, weight); equal forms leave the number open.
DETERMINERS: tuple[tuple[str, str, float], ...] = (
    ("the", "the", 3.0),
    ("a", "several", 4.0),
    ("this", "these", 3.0),
    ("every", "many", 1.5),
    ("one", "two", 1.0),
    ("some", "some", 0.5),
    ("my", "my", 0.5),
    ("their", "their", 0.5),
)
PRONOUNS = (("he", "they"), ("she", "we"))


@dataclass(slots=True, eq=False)
class Word:
    """One word form. `number` is SINGULAR, PLURAL or None; `other` the same word in the other number, where the form
    differs.

    `even` tells that both forms have the same number of WordPieces; `columns` are the CoNLL-U columns FORM to FEATS.
    """

    form: str
    lemma: str
    upos: str
    feats: str = "_"
    number: int | None = None
    other: Word | None = None
    even: bool = True
    columns: str = field(init=False)

    def __post_init__(self) -> None:
        self.columns = "\t".join((self.form, self.lemma, self.upos, "_", self.feats))


Forms = tuple[Word, Word]  # indexed by SINGULAR, PLURAL


def add_s(stem: str) -> str:
    """English spelling of the -s of plural nouns and of third-person singular verbs."""
    if stem.endswith(("s", "x", "z", "ch", "sh")):
        return stem + "es"
    if stem.endswith("y") and stem[-2] not in "aeiou":
        return stem[:-1] + "ies"
    return stem + "s"


def noun(stem: str) -> Forms:
    """Both forms of a noun."""
    return _forms(stem, add_s(stem), stem, "NOUN", "Number={}")


def verb(stem: str) -> Forms:
    """Both forms of a verb, by the number of its subject: the singular has the -s."""
    return _forms(add_s(stem), stem, stem, "VERB", "Mood=Ind|Number={}|Person=3|Tense=Pres|VerbForm=Fin")


def _forms(singular: str, plural: str, lemma: str, upos: str, feats: str) -> Forms:
    one = Word(singular, lemma, upos, feats.format("Sing"), SINGULAR)
    many = Word(plural, lemma, upos, feats.format("Plur"), PLURAL)
    one.other, many.other = many, one
    return one, many


@dataclass(frozen=True)
class Lexicon:
    """All words, by class index where a class selects them, in order of frequency, and the WordPiece vocabulary."""

    nouns: list[list[Forms]]
    adjectives: list[list[Word]]
    adverbs: list[list[Word]]
    intransitive: list[list[Forms]]
    transitive: list[list[tuple[Forms, int]]]  # by subject class: (verb, object class)
    complement: list[Forms]
    ditransitive: list[Forms]
    prepositions: list[tuple[Word, tuple[int, int]]]
    determiners: list[tuple[Forms, float]]
    pronouns: list[Forms]
    copula: Forms
    an: Word
    that_relative: Word
    that_complementiser: Word
    conjunction: Word
    comma: Word
    period: Word
    vocabulary: list[str]


@functools.cache
def lexicon() -> Lexicon:
    """The toy language's lexicon. It has no seed: every corpus is in the same language."""
    index = {name: i for i, name in enumerate(CLASS_NAMES)}
    nouns = [[noun(stem) for stem in entry.nouns.split()] for entry in CLASSES.values()]
    intransitive = [[verb(stem) for stem in entry.intransitive.split()] for entry in CLASSES.values()]
    transitive: list[list[tuple[Forms, int]]] = [[] for _ in CLASSES]
    for subject, entry in enumerate(CLASSES.values()):
        first, second = entry.objects.items()
        # Alternating keeps the two object classes about equally frequent under Zipf's law.
        for stems in zip(first[1].split(), second[1].split(), strict=True):
            for stem, name in zip(stems, (first[0], second[0]), strict=True):
                forms = verb(stem)
                transitive[subject].append((forms, index[name]))
    determiners = []
    for singular, plural, weight in DETERMINERS:
        if singular == plural:
            word = Word(singular, singular, "DET")
            determiners.append(((word, word), weight))
        else:
            determiners.append((_forms(singular, plural, singular, "DET", "Number={}"), weight))
    complement = [verb(stem) for stem in COMPLEMENT_VERBS.split()]
    ditransitive = [verb(stem) for stem in DITRANSITIVE_VERBS.split()]
    for group in nouns:
        _mark_rare(group)
    for group in intransitive:
        _mark_rare(group)
    for pairs in transitive:
        _mark_rare([forms for forms, _ in pairs])
    result = Lexicon(
        nouns=nouns,
        adjectives=[[Word(form, form, "ADJ") for form in entry.adjectives.split()] for entry in CLASSES.values()],
        adverbs=[[Word(form, form, "ADV") for form in entry.adverbs.split()] for entry in CLASSES.values()],
        intransitive=intransitive,
        transitive=transitive,
        complement=complement,
        ditransitive=ditransitive,
        prepositions=[
            (Word(form, form, "ADP"), (index[first], index[second])) for form, (first, second) in PREPOSITIONS.items()
        ],
        determiners=determiners,
        pronouns=[_forms(one, many, one, "PRON", "Case=Nom|Number={}|PronType=Prs") for one, many in PRONOUNS],
        copula=_forms("is", "are", "be", "AUX", "Mood=Ind|Number={}|Tense=Pres|VerbForm=Fin"),
        an=Word("an", "a", "DET", "Number=Sing", SINGULAR),
        that_relative=Word("that", "that", "PRON", "PronType=Rel"),
        that_complementiser=Word("that", "that", "SCONJ"),
        conjunction=Word("and", "and", "CCONJ"),
        comma=Word(",", ",", "PUNCT"),
        period=Word(".", ".", "PUNCT"),
        vocabulary=[],
    )
    result.vocabulary.extend(_vocabulary(result))
    return result


# The rarest fifth of each list gets no whole-word entry for its longer form (`lemon ##s`), as rare words do in a
# trained vocabulary.
RARE_SHARE = 0.2
# Lemmas at least this long are cut in both forms (`screwd ##river`, `screwd ##rivers`).
LONG_LEMMA = 9


def _mark_rare(group: list[Forms]) -> None:
    """Mark the rare words whose two forms get different numbers of pieces."""
    for one, many in group[round(len(group) * (1 - RARE_SHARE)) :]:
        longer = max(one.form, many.form, key=len)
        one.even = many.even = len(one.lemma) >= LONG_LEMMA or not longer.startswith(one.lemma)


def _vocabulary(words: Lexicon) -> list[str]:
    """BERT's special tokens, characters (so that nothing is [UNK]), then words and parts of words in the order of the
    lexicon."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    entries = [*SPECIAL_TOKENS, ",", ".", *letters, *("##" + letter for letter in letters)]
    single = [
        *(word for forms, _ in words.determiners for word in forms),
        words.an,
        *(word for forms in words.pronouns for word in forms),
        *words.copula,
        words.that_relative,
        words.conjunction,
        *(word for word, _ in words.prepositions),
        *(word for group in (*words.adjectives, *words.adverbs) for word in group),
    ]
    inflected = [
        *words.complement,
        *words.ditransitive,
        *(forms for group in (*words.nouns, *words.intransitive) for forms in group),
        *(forms for group in words.transitive for forms, _ in group),
    ]
    for word in [*single, *(word for forms in inflected for word in forms)]:
        if len(word.lemma) >= LONG_LEMMA:
            cut = (len(word.lemma) + 1) // 2
            entries += [word.form[:cut], "##" + word.form[cut:]]
        elif word.even or word.form == word.lemma:
            entries.append(word.form)
        else:
            entries.append("##" + word.form[len(word.lemma) :])
    return list(dict.fromkeys(entries))
