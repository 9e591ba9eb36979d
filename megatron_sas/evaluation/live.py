"""Everything that is evaluated while a model trains: the section `evaluation`, and what it asks for, prepared once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import Field

from megatron_sas.core.settings import When
from megatron_sas.data.packed import PackedData
from megatron_sas.data.unknown import Unknown
from megatron_sas.evaluation.base import TEXT, Evaluation, Resources
from megatron_sas.evaluation.batching import Encoder, after_each_forward
from megatron_sas.evaluation.registry import EVALUATIONS, live_metrics, own_input_first

MOST_HEADS = 0.75


class EvaluationSection(*(evaluation.settings for evaluation in reversed(own_input_first())), When):
    """When and on what the model is evaluated while it trains."""

    batch_tokens: int = Field(16_384, description="tokens per evaluation forward", ge=1)


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
    wanted = [evaluation for evaluation in EVALUATIONS.values() if text is not None and evaluation.wanted(section)]
    return [f"evaluation.{phrase}" for evaluation in wanted for phrase in evaluation.shortages(section, text)]


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

    def evaluate(self, model: Encoder, after_batch: Callable[[], object] | None = None) -> dict[str, Any]:
        """All metrics of one evaluation. A collective: every rank makes the same number of forward passes.

        `after_batch` is called after each of them; an exception that it raises ends the evaluation.
        """
        values: dict[str, Any] = {}
        with after_each_forward(model, after_batch) if after_batch else contextlib.nullcontext():
            for evaluation in self.evaluations.values():
                values |= evaluation.run(model)
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
