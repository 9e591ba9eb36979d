"""Grammatical acceptability: BLiMP (Warstadt et al. 2020) by pseudo-log-likelihood, and sets in its file format."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from megatron_sas.core.cli import InputError
from megatron_sas.core.files import sha256_file
from megatron_sas.core.settings import Section
from megatron_sas.corpus.readers.text_lines import is_encodable, parse_json
from megatron_sas.evaluation.base import Evaluation, Metric, Resources
from megatron_sas.evaluation.batching import Encoder
from megatron_sas.evaluation.blimp_labels import MANY_TIES, canonical, means_over_sets
from megatron_sas.evaluation.files import numbered_lines, read_text
from megatron_sas.evaluation.items import BlimpItems
from megatron_sas.evaluation.pll import PllTask

RESOLUTION = 2.0**-22  # of a score: a sum of float32 log-probabilities, whose last digits depend on the batch

BLIMP = Metric("blimp", "minimal pairs", 1, title="BLiMP", printed="blimp", point=("blimp", "blimp"), chance=0.5)
TIES = Metric("blimp_ties", point=("blimp", "num_ties"))
FIELDS = Metric("blimp_fields", "minimal pairs, {}", point=("blimp", "fields"), each="blimp_{}")
TERMS = Metric("blimp_terms", point=("blimp", "terms"))
SETS = Metric("blimp_sets", point=("blimp", "sets"))

_FIELDS = ("sentence_good", "sentence_bad", "field", "linguistics_term", "UID")


@dataclass(frozen=True)
class PairSet:
    """One file of minimal pairs: (good, bad) sentences, and where the set belongs in the benchmark."""

    uid: str
    field: str
    term: str
    pairs: Sequence[tuple[str, str]]


def load_blimp(directory: str | Path) -> list[PairSet]:
    """Read every `*.jsonl` file of a directory, in order of file name, as one set each.

    A line is a JSON object with strings `sentence_good`, `sentence_bad`, `field`, `linguistics_term` and `UID`, the
    last three equal within a file; other fields are ignored. Field and term get the one name that they have in
    `blimp_labels`. Pairs of equal sentences stay (BLiMP has a few): no model gets them right. Raises `InputError`
    naming file and line for anything else.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"{directory}: no such directory; give the folder that holds BLiMP's .jsonl files")
    sets: dict[str, PairSet] = {}
    for path in sorted(directory.glob("*.jsonl")):
        pair_set = _read_set(path)
        if pair_set.uid in sets:
            raise InputError(
                f"{path}: UID {pair_set.uid!r} is also that of another file in the folder; keep one of them"
            )
        sets[pair_set.uid] = pair_set
    if not sets:
        raise InputError(f"{directory}: no .jsonl files in it; give the folder that holds BLiMP's .jsonl files")
    return list(sets.values())


def sha256_folder(directory: Path) -> str:
    """One hash over names and contents of the .jsonl files that `load_blimp` reads."""
    lines = "".join(f"{sha256_file(path)}  {path.name}\n" for path in sorted(directory.glob("*.jsonl")))
    return hashlib.sha256(lines.encode()).hexdigest()


class BlimpTask:
    """Minimal pairs prepared for one tokenizer, to be evaluated many times; all pairs or the first few of each set.

    Scores are float64 (2 · pairs,): good, bad, good, bad, …, set after set.

    Raises `InputError` for a sentence that does not fit `max_length` tokens or has none, and for `pairs_per_set` below
    1.
    """

    def __init__(
        self,
        data: Sequence[PairSet],
        tokenizer: Any,
        metric: str = "pll",
        pairs_per_set: int | None = None,
        max_length: int | None = None,
    ) -> None:
        if pairs_per_set is not None and pairs_per_set < 1:
            raise InputError(f"pairs_per_set: {pairs_per_set} is below 1; leave it out to use all pairs")
        self.metric, self.pairs_per_set = metric, pairs_per_set
        self.sets = [replace(s, pairs=s.pairs[:pairs_per_set]) for s in data]
        sentences = [sentence for s in self.sets for pair in s.pairs for sentence in pair]
        names = [f"{s.uid}: pair {index}" for s in self.sets for index in range(len(s.pairs)) for _ in range(2)]
        self.pll = PllTask(sentences, tokenizer, metric, max_length, names)

    def evaluate(self, model: Encoder, *, batch_tokens: int = 8192) -> dict:
        """Score all pairs and summarise.

        Every rank returns the same numbers (but for `seconds`).

        Keys: `blimp` (mean over the sets), `fields` and `terms` (means over the sets within each), `sets` (accuracy,
        correct, num_pairs, ties, identical, field, linguistics_term), `metric`, `pairs_per_set`, `num_sets`,
        `num_pairs`, `num_ties` (pairs that the scores do not decide: they count as wrong), `num_identical` (those of
        them whose two sentences are the same to the tokenizer), `num_sentences`, `num_masked_copies`,
        `num_non_finite` (sentences whose score is not a number: their pairs count as wrong), `unknown` (tokens that
        are [UNK]), `seconds`, `sentences_per_second`.
        """
        return self.evaluate_with_items(model, batch_tokens)[0]

    def evaluate_with_items(self, model: Encoder, batch_tokens: int) -> tuple[dict, BlimpItems]:
        """The result of `evaluate`, and which pairs were right."""
        started = time.perf_counter()
        scores = self.pll.score(model, batch_tokens=batch_tokens)
        result = self.summarize(scores, time.perf_counter() - started)
        set_numbers = np.repeat(np.arange(len(self.sets), dtype=np.int16), [len(s.pairs) for s in self.sets])
        return result, BlimpItems(self._decide(scores)[0], set_numbers, [s.uid for s in self.sets])

    def _decide(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Whether each pair's good sentence scores strictly higher, and whether its scores are a tie: bool (pairs,).

        They are where they differ by less than rounding makes them differ: a model that has no preference would
        otherwise seem to have one, by which batches its sentences were in.
        """
        good, bad = scores[0::2], scores[1::2]
        finite = np.isfinite(good) & np.isfinite(bad)
        distance = np.abs(np.subtract(good, bad, where=finite, out=np.full(len(good), np.inf)))
        ties = finite & (distance <= RESOLUTION * np.maximum(np.abs(good), np.abs(bad)))
        return (good > bad) & ~ties, ties

    def summarize(self, scores: np.ndarray, seconds: float) -> dict:
        """The result of `evaluate` from the scores of the sentences."""
        correct, ties = self._decide(scores)
        identical = self.pll.first_equal[0::2] == self.pll.first_equal[1::2]
        ends = np.cumsum([len(s.pairs) for s in self.sets])
        by_set = zip(self.sets, *(np.split(flags, ends[:-1]) for flags in (correct, ties, identical)), strict=True)
        sets = {
            s.uid: {
                "accuracy": int(right.sum()) / len(right),
                "correct": int(right.sum()),
                "num_pairs": len(right),
                "ties": int(tied.sum()),
                "identical": int(same.sum()),
                "field": s.field,
                "linguistics_term": s.term,
            }
            for s, right, tied, same in by_set
        }
        return {
            BLIMP.key: float(np.mean([result["accuracy"] for result in sets.values()])),
            "fields": means_over_sets(sets, "field"),
            "terms": means_over_sets(sets, "linguistics_term"),
            "sets": sets,
            "metric": self.metric,
            "pairs_per_set": self.pairs_per_set,
            "num_sets": len(sets),
            "num_pairs": len(correct),
            "num_ties": int(ties.sum()),
            "num_identical": int(identical.sum()),
            "num_sentences": len(scores),
            "num_masked_copies": self.pll.num_copies,
            "num_non_finite": int((~np.isfinite(scores)).sum()),
            "unknown": self.pll.unknown.record(),
            "seconds": seconds,
            "sentences_per_second": len(scores) / seconds,
        }


def _read_set(path: Path) -> PairSet:
    pairs, labels = [], None
    for line, where in numbered_lines(path, read_text(path)):
        value = _parse_pair(line, where)
        here = (value["UID"], *(canonical(kind, value[kind]) for kind in ("field", "linguistics_term")))
        if labels is not None and here != labels:
            raise InputError(f"{where}: UID, field and linguistics_term are {here}, above {labels}; one set a file")
        labels = here
        pairs.append((value["sentence_good"], value["sentence_bad"]))
    if labels is None:
        raise InputError(f"{path}: no pairs in it; remove the file or fill it")
    return PairSet(*labels, pairs)


def _parse_pair(line: str, where: str) -> dict:
    value = parse_json(line, where)
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected an object, found {type(value).__name__}")
    for field in _FIELDS:
        if not isinstance(value.get(field), str) or not value[field].strip():
            raise InputError(f"{where}: field {field!r} is missing or not a non-empty string")
        if not is_encodable(value[field]):
            raise InputError(f"{where}: half of a surrogate pair in field {field!r}; correct or remove it")
    return value


def many_ties(values: Mapping[str, Any]) -> tuple[int, int] | None:
    """(ties, pairs) of an evaluation record, if its ties are more than one may pass over."""
    if not (ties := values.get(TIES.key)):
        return None
    pairs = sum(row["num_pairs"] for row in (values.get(SETS.key) or {}).values())
    return (ties, pairs) if ties > MANY_TIES * pairs else None


class BlimpSettings(Section):
    """Of minimal pairs."""

    blimp: str | None = Field(None, description="directory of minimal pairs (*.jsonl)")
    blimp_pairs_per_set: int | None = Field(None, description="use the first so many pairs of each set", ge=1)
    blimp_metric: Literal["pll", "within_word_l2r"] = Field("pll", description="how a sentence is scored")


class BlimpEvaluation(Evaluation):
    """BLiMP, or sets in its file format."""

    settings = BlimpSettings
    metrics = (BLIMP, TIES, FIELDS, TERMS, SETS)
    input, input_title = "blimp", "minimal pairs"
    items = BlimpItems
    item_counts = (SETS.key, "num_pairs")

    @classmethod
    def preview(cls, section: BlimpSettings) -> tuple[str, list[str]]:
        """See `Evaluation`."""
        sets, limit, short = load_blimp(section.blimp), section.blimp_pairs_per_set, []
        smallest = min(len(pairs.pairs) for pairs in sets)
        if limit is not None and smallest < limit:
            short = [f"blimp_pairs_per_set: {limit} are wanted, but a set has only {smallest}"]
        used = "all pairs" if limit is None else f"the first {limit} pairs of each"
        return f"{len(sets)} sets, {used} are used", short

    def __init__(self, section: Any, resources: Resources) -> None:
        super().__init__(section, resources)
        pairs, limit = load_blimp(section.blimp), section.blimp_pairs_per_set
        self.task = BlimpTask(pairs, resources.tokenizer, section.blimp_metric, limit, resources.max_length)
        self.unknown = self.task.pll.unknown

    def run(self, model: Encoder) -> dict[str, Any]:
        """See `Evaluation`."""
        result = self.task.evaluate(model, batch_tokens=self.section.batch_tokens)
        values = {metric.key: result[metric.point[-1]] for metric in self.metrics}
        names = ("accuracy", "num_pairs", "ties")
        return values | {SETS.key: {uid: {n: row[n] for n in names} for uid, row in result["sets"].items()}}

    def measure(self, model: Encoder) -> tuple[dict[str, Any], BlimpItems]:
        """The whole result of `BlimpTask.evaluate`."""
        result, items = self.task.evaluate_with_items(model, self.section.batch_tokens)
        return {BLIMP.point[0]: result}, items

    def source(self) -> dict[str, Any]:
        """See `Evaluation`."""
        path, section = Path(self.section.blimp), self.section
        identity = {"path": str(path.resolve()), "sha256": sha256_folder(path)}
        return {**identity, "metric": section.blimp_metric, "pairs_per_set": section.blimp_pairs_per_set}

    @classmethod
    def warning(cls, values: Mapping[str, Any]) -> str:
        """Many ties."""
        tied = many_ties(values)
        return f"{tied[0]} ties count as wrong" if tied else ""

    @classmethod
    def independent_items(cls, counts: Sequence[int], rows: int) -> float:
        """S² / Σ 1/nₛ for the pairs nₛ of each of S sets, as BLiMP is a mean over sets."""
        return rows**2 / sum(1 / count for count in counts) if counts and len(counts) == rows else 0.0
