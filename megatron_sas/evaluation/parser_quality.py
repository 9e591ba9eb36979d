"""How good a parser's edges are: its parse of a treebank's text, brought onto the gold words by character.

The same alignment that gives tokens their edges (`corpus/build/align.py`) takes gold words as its tokens here. A gold
word that is not the first in a parser's word, or has no characters of its own, has no predicted head: that is wrong.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_sas.core.cli import InputError, progress
from megatron_sas.corpus.build.align import align
from megatron_sas.corpus.parsers.base import Parse, Parser, RelationNames
from megatron_sas.corpus.readers.conllu import ConlluSentence
from megatron_sas.data.packed import WORD_START

ROOT, NONE = -1, -2  # predicted heads: the parser calls the word a root; the word has no prediction

# Labels of spaCy's English models (ClearNLP) and the Universal Dependencies that stand for the same thing; several,
# where UD splits what ClearNLP does not. Where UD turns the edge round (case, cop), head and label cannot both agree.
CLEARNLP_TO_UD: dict[str, frozenset[str]] = {
    name: frozenset(accepted.split())
    for name, accepted in {
        "ROOT": "root", "acl": "acl", "acomp": "xcomp", "advcl": "advcl", "advmod": "advmod", "agent": "case",
        "amod": "amod", "appos": "appos", "attr": "xcomp", "aux": "aux mark", "auxpass": "aux", "case": "case",
        "cc": "cc", "ccomp": "ccomp parataxis", "compound": "compound flat", "conj": "conj", "csubj": "csubj",
        "csubjpass": "csubj", "dative": "iobj case", "dep": "dep", "det": "det", "dobj": "obj", "expl": "expl",
        "intj": "discourse", "mark": "mark", "meta": "discourse", "neg": "advmod", "nmod": "nmod compound",
        "npadvmod": "obl", "nsubj": "nsubj", "nsubjpass": "nsubj", "nummod": "nummod", "oprd": "xcomp",
        "parataxis": "parataxis", "pcomp": "advcl acl", "pobj": "obl nmod", "poss": "nmod", "preconj": "cc",
        "predet": "det", "prep": "case", "prt": "compound", "punct": "punct", "quantmod": "advmod", "relcl": "acl",
        "xcomp": "xcomp",
    }.items()
}  # fmt: skip
_CLEARNLP_ONLY = {"dobj", "pobj", "prep"}


@dataclass
class GoldUnit:
    """One text for the parser with its gold words."""

    text: str
    parse: Parse
    relations: list[str]  # (W,), without subtype


def gold_units(sentences: Iterable[ConlluSentence], paragraphs: bool) -> list[GoldUnit]:
    """Sentences one by one, or joined by spaces into paragraphs (a new one at `# newdoc` and `# newpar`)."""
    groups: list[list[ConlluSentence]] = []
    for sentence in sentences:
        starts = sentence.newdoc or any(comment.startswith("newpar") for comment in sentence.comments)
        if starts or not paragraphs or not groups:
            groups.append([])
        groups[-1].append(sentence)
    return [_unit(group) for group in groups]


def _unit(sentences: list[ConlluSentence]) -> GoldUnit:
    parses, characters, words = [], 0, 0
    for sentence in sentences:
        parse = Parse.of_words(sentence.spans, sentence.heads, np.zeros(len(sentence.words)))
        parses.append(parse.shifted(characters, words))
        characters += len(sentence.text) + 1
        words += len(sentence.words)
    relations = [name.split(":")[0] for sentence in sentences for name in sentence.deprels]
    return GoldUnit(" ".join(sentence.text for sentence in sentences), Parse.concatenate(parses), relations)


def predicted_heads(gold: Parse, parse: Parse, text: str) -> tuple[np.ndarray, np.ndarray]:
    """The parser's head of each gold word (an index, `ROOT` or `NONE`) and its relation number, both int64 (W,)."""
    heads = np.full(len(gold.starts), NONE, dtype=np.int64)
    relations = np.zeros(len(heads), dtype=np.int64)
    visible = np.flatnonzero(gold.ends > gold.starts)
    aligned = align(gold.starts[visible], gold.ends[visible], parse, text)
    first = np.flatnonzero(aligned.boundaries & WORD_START)
    head = np.where(parse.heads[aligned.words[first]] < 0, ROOT, NONE)
    offset = aligned.offsets[first]
    heads[visible[first]] = np.where(offset != 0, visible[first + offset], head)
    relations[visible[first]] = aligned.relations[first]
    return heads, relations


def score_parses(units: Sequence[GoldUnit], parses: Iterable[Parse], names: Sequence[str]) -> dict[str, Any]:
    """Compare parses with gold units; `names` are the relation names of the parses.

    Keys: `words`; `uas` and `las` over all gold words, roots included; `uas_without_punct`, `las_without_punct`;
    `uuas`, the share of gold edges (roots are none) that the parser has in either direction; `edge_precision`, the
    share of the parser's edges that are gold; `words_without_prediction`; `labels`, how labels were compared
    ("ClearNLP to UD" or "equal names"); `relations`: by gold relation count, uas, uuas, las, and how often the parser
    gave which label.
    """
    clearnlp = bool(_CLEARNLP_ONLY & set(names))
    totals: Counter[str] = Counter()
    table: dict[str, Counter[str]] = defaultdict(Counter)
    labels: dict[str, Counter[str]] = defaultdict(Counter)
    for unit, parse in zip(units, parses, strict=True):
        heads, numbers = predicted_heads(unit.parse, parse, unit.text)
        totals["predicted edges"] += int((heads >= 0).sum())
        totals["words without prediction"] += int((heads == NONE).sum())
        for word, (gold, relation) in enumerate(zip(unit.parse.heads.tolist(), unit.relations, strict=True)):
            label = names[numbers[word]]
            if label.lower() == "root" or heads[word] == ROOT:
                label = "ROOT"  # spaCy leaves roots without an edge, and so without a relation in the data
            accepted = CLEARNLP_TO_UD.get(label, frozenset()) if clearnlp else {label.split(":")[0].lower()}
            right = int(heads[word]) == gold
            counts = table[relation]
            counts["count"] += 1
            counts["uas"] += right
            counts["las"] += right and relation in accepted
            counts["edges"] += gold >= 0
            counts["either"] += gold >= 0 and (right or int(heads[gold]) == word)
            labels[relation][label if heads[word] != NONE else "(none)"] += 1
    return _summary(totals, table, labels, "ClearNLP to UD" if clearnlp else "equal names")


def _summary(
    totals: Counter[str], table: dict[str, Counter[str]], labels: dict[str, Counter[str]], compared: str
) -> dict[str, Any]:
    everything = sum(table.values(), Counter())
    if not everything["edges"]:
        raise InputError("treebank: no dependency to score; check column HEAD")
    inner = everything - table.get("punct", Counter())
    correct_edges = everything["uas"] - table.get("root", Counter())["uas"]
    return {
        "words": everything["count"],
        **_rates(everything),
        **{f"{name}_without_punct": rate for name, rate in _rates(inner).items()},
        "uuas": everything["either"] / everything["edges"],
        "edge_precision": correct_edges / max(1, totals["predicted edges"]),
        "words_without_prediction": totals["words without prediction"],
        "labels": compared,
        "relations": {
            relation: {
                "count": row["count"],
                "uas": _rates(row)["uas"],
                "uuas": row["either"] / row["edges"] if row["edges"] else None,
                "las": _rates(row)["las"],
                "predicted": dict(labels[relation].most_common()),
            }
            for relation, row in sorted(table.items(), key=lambda item: (-item[1]["count"], item[0]))
        },
    }


def _rates(row: Counter[str]) -> dict[str, float]:
    return {name: row[name] / row["count"] for name in ("uas", "las")}


def evaluate_parser(units: Sequence[GoldUnit], parser: Parser) -> dict[str, Any]:
    """`score_parses` of what `parser` makes of the units' texts."""
    names = RelationNames()
    parses = parser.parse([unit.text for unit in units], [], names)  # encodings: only `none` looks at them
    parses = list(progress(parses, total=len(units), unit=" texts", desc="parsing"))
    return score_parses(units, parses, names.names)


def differing_heads(texts: list[str], parser: Parser, other: Parser) -> dict[str, int]:
    """How many `words` the texts have, and of how many the heads of two parsers with one tokenizer are `differing`."""
    words = differing = 0
    pairs = zip(*(one.parse(texts, [], RelationNames()) for one in (parser, other)), strict=True)
    for parse, reference in progress(pairs, total=len(texts), unit=" texts", desc="comparing"):
        words += int(parse.is_word.sum())
        differing += int((parse.is_word & (parse.heads != reference.heads)).sum())
    return {"words": words, "differing": differing}
