"""Words of the toy language by number, for tests."""

from __future__ import annotations

from itertools import chain

from megatron_sas.toy.lexicon import CLASSES, COMPLEMENT_VERBS, DITRANSITIVE_VERBS, add_s

VERBS = {
    stem
    for entry in CLASSES.values()
    for stem in chain(entry.intransitive.split(), *(verbs.split() for verbs in entry.objects.values()))
} | set(f"{COMPLEMENT_VERBS} {DITRANSITIVE_VERBS}".split())


NOUNS = {stem for entry in CLASSES.values() for stem in entry.nouns.split()}


VERB_NUMBER = (
    {add_s(v): "singular" for v in VERBS} | dict.fromkeys(VERBS, "plural") | {"is": "singular", "are": "plural"}
)


NOUN_NUMBER = dict.fromkeys(NOUNS, "singular") | {add_s(n): "plural" for n in NOUNS}


SUBJECT_NUMBER = NOUN_NUMBER | {"he": "singular", "she": "singular", "they": "plural", "we": "plural"}


DETERMINER_NUMBER = dict.fromkeys(("a", "an", "this", "every", "one"), "singular") | dict.fromkeys(
    ("several", "these", "many", "two"), "plural"
)
