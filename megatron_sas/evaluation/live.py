"""Everything that is evaluated while a model trains, prepared once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_sas.data.packed import PackedData
from megatron_sas.data.unknown import Unknown
from megatron_sas.evaluation.base import TEXT, Evaluation, Resources
from megatron_sas.evaluation.batching import AfterBatch
from megatron_sas.evaluation.registry import EVALUATIONS, live_metrics
from megatron_sas.evaluation.section import EvaluationSection
from megatron_sas.model.base import MaskedLM

MOST_HEADS = 0.75


def prepare(section: EvaluationSection, resources: Resources) -> dict[str, Evaluation]:
    """The evaluations that a section asks for and that there is an input for, in the order of `EVALUATIONS`.

    Raises:
        InputError: an input is wrong.
    """
    return {
        name: evaluation(section, resources)
        for name, evaluation in EVALUATIONS.items()
        if evaluation.wanted(section) and (evaluation.input != TEXT or resources.text is not None)
    }


def shortages(section: EvaluationSection, text: PackedData | None) -> list[str]:
    """What a section asks for and the held-out text cannot give, a phrase each."""
    return [
        f"evaluation.{phrase}"
        for evaluation in EVALUATIONS.values()
        if text is not None and evaluation.wanted(section)
        for phrase in evaluation.shortages(section, text)
    ]


class LiveEvaluation:
    """The evaluations that a configuration asks for; each that is not configured is left out.

    Raises:
        InputError: an input is wrong.
    """

    def __init__(self, section: EvaluationSection, resources: Resources) -> None:
        self.section, self.validation = section, resources.text
        self.evaluations = prepare(section, resources)

    def unknown(self) -> dict[str, Unknown]:
        """How much of each input the tokenizer does not know, by the field that names the input."""
        known = {evaluation.input: evaluation.unknown for evaluation in self.evaluations.values()}
        return {f"evaluation.{name}": unknown for name, unknown in known.items() if unknown is not None}

    def facts(self) -> dict[str, Any]:
        """What the record of a run's start says about the inputs."""
        return {name: value for evaluation in self.evaluations.values() for name, value in evaluation.facts().items()}

    def notes(self) -> list[str]:
        """Lines for the user about the inputs."""
        return [f"evaluation.{e.input}: {note}" for e in self.evaluations.values() for note in e.notes()]

    def evaluate(self, model: MaskedLM, after_batch: AfterBatch | None = None) -> dict[str, Any]:
        """All metrics of one evaluation. A collective: every rank makes the same number of forwards.

        `after_batch` is called after each forward; an exception that it raises ends the evaluation.
        """
        values: dict[str, Any] = {}
        for evaluation in self.evaluations.values():
            values |= evaluation.run(model, after_batch)
        return values


def evaluation_line(values: Mapping[str, Any]) -> str:
    """An evaluation record in a line for the user; "" where nothing in it is printed."""
    printed = [metric for metric in live_metrics() if metric.printed and values.get(metric.key) is not None]
    line = "  ".join(f"{metric.printed} {values[metric.key]:{metric.format}}" for metric in printed)
    warnings = [text for evaluation in EVALUATIONS.values() if (text := evaluation.warning(values))]
    return line + "".join(f" (warning: {text})" for text in warnings)


def collapsed_attention(values: dict[str, Any]) -> dict[str, Any] | None:
    """What an evaluation measured of attention, if most heads have collapsed: on validation data, else on the treebank.

    A head that attends to little but [SEP] is ordinary in a trained BERT; that most heads do so at once is not.
    """
    attention = values.get("validation_attention", values.get("treebank_attention"))
    return attention if attention is not None and attention["collapsed_heads"] >= MOST_HEADS else None
