"""Everything that is evaluated while a model trains, prepared once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from megatron_sas.core.settings import When
from megatron_sas.data.packed import PackedData
from megatron_sas.data.unknown import Unknown
from megatron_sas.evaluation.batching import AfterBatch
from megatron_sas.evaluation.blimp_labels import MANY_TIES
from megatron_sas.evaluation.complexity import cls_vectors, intrinsic_dimension
from megatron_sas.evaluation.minimal_pairs import BlimpTask, load_blimp
from megatron_sas.evaluation.observers import AttentionStatistics
from megatron_sas.evaluation.text import packed_text
from megatron_sas.evaluation.treebank import load_treebank
from megatron_sas.evaluation.uas import TreebankTask
from megatron_sas.evaluation.validation import evaluate_validation
from megatron_sas.model.bert import Bert
from megatron_sas.objective.base import Term

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


MOST_HEADS = 0.75
ENOUGH_POINTS = 100
"""Below this the standard error of TwoNN is a tenth of its value or more."""


class EvaluationSection(When):
    """When and on what the model is evaluated while it trains."""

    treebank: str | None = Field(None, description="CoNLL-U or JSON lines for UAS")
    treebank_sentences: int | None = Field(None, description="use the first so many sentences", ge=1)
    blimp: str | None = Field(None, description="directory of minimal pairs (*.jsonl)")
    blimp_pairs_per_set: int | None = Field(None, description="use the first so many pairs of each set", ge=1)
    blimp_metric: Literal["pll", "within_word_l2r"] = Field("pll", description="how a sentence is scored")
    validation_sequences: int = Field(256, description="sequences of data.validation for the MLM loss", ge=1)
    complexity_sequences: int | None = Field(
        None, description="sequences of data.validation for TwoNN intrinsic dimension; none: not measured", ge=10
    )
    batch_tokens: int = Field(16_384, description="tokens per evaluation forward", ge=1)


def shortages(section: EvaluationSection, validation: PackedData | None) -> list[str]:
    """What the configuration asks for and the validation data cannot give, a phrase each."""
    if validation is None:
        return []
    there, found = validation.num_sequences, []
    for name in ("validation_sequences", "complexity_sequences"):
        wanted = getattr(section, name)
        given = name in section.model_fields_set  # a default is no wish
        if wanted is not None and there < wanted and given:
            found.append(f"evaluation.{name}: {wanted} are wanted, but {validation.prefix} has {there}")
    if section.complexity_sequences is not None and min(there, section.complexity_sequences) < ENOUGH_POINTS:
        found.append(
            f"evaluation.complexity_sequences: TwoNN from {min(there, section.complexity_sequences)} points says "
            f"little; give it {ENOUGH_POINTS} or more"
        )
    return found


class LiveEvaluation:
    """The evaluations that a configuration asks for; each part that is not configured is left out.

    Raises:
        InputError: a treebank or minimal-pair file is wrong.
    """

    def __init__(
        self,
        section: EvaluationSection,
        tokenizer: PreTrainedTokenizerBase,
        validation: PackedData | None,
        *,
        max_length: int,
        terms: Mapping[str, Term],
        mask_prob: float,
    ) -> None:
        self.section, self.validation = section, validation
        self.terms, self.mask_prob = terms, mask_prob
        self.treebank: TreebankTask | None = None
        if section.treebank is not None:
            sentences = load_treebank(section.treebank, section.treebank_sentences)
            self.treebank = TreebankTask(sentences, tokenizer, max_length)
        self.blimp: BlimpTask | None = None
        if section.blimp is not None:
            self.blimp = BlimpTask(
                load_blimp(section.blimp), tokenizer, section.blimp_metric, section.blimp_pairs_per_set, max_length
            )

    def unknown(self) -> dict[str, Unknown]:
        """How much of each input the tokenizer does not know, by the field that names the input."""
        found = {}
        if self.treebank is not None:
            found["evaluation.treebank"] = self.treebank.unknown
        if self.blimp is not None:
            found["evaluation.blimp"] = self.blimp.pll.unknown
        return found

    def evaluate(self, model: Bert, after_batch: AfterBatch | None = None) -> dict[str, Any]:
        """All metrics of one evaluation. A collective: every rank makes the same number of forwards.

        `after_batch` is called after each forward; an exception that it raises ends the evaluation.
        """
        values: dict[str, Any] = {}
        batch_tokens = self.section.batch_tokens
        if self.validation is not None:
            info = self.validation.tokenizer
            statistics = AttentionStatistics(info.cls_id, info.sep_id)
            values |= evaluate_validation(
                model,
                self.validation,
                self.terms,
                num_sequences=self.section.validation_sequences,
                batch_tokens=batch_tokens,
                mask_prob=self.mask_prob,
                after_batch=after_batch,
                statistics=statistics,
            )
            values["validation_attention"] = statistics.result()
            if self.section.complexity_sequences is not None:
                total = min(self.section.complexity_sequences, self.validation.num_sequences)
                batches = packed_text(self.validation, num_sequences=total, batch_tokens=batch_tokens)
                vectors = cls_vectors(model, batches, total, after_batch=after_batch)
                dimension = intrinsic_dimension(vectors, self.validation.tokens[:total])
                values |= {"twonn": dimension["twonn"], "twonn_standard_error": dimension["standard_error"]}
                values["twonn_duplicates"] = dimension["duplicates"]
        if self.treebank is not None:
            statistics = self.treebank.attention_statistics()
            result = self.treebank.evaluate(
                model, batch_tokens=batch_tokens, after_batch=after_batch, statistics=statistics
            )
            values |= {name: result[name] for name in ("uas", "uas_baseline", "uas_single_head")}
            values["uas_relations"] = result["relations"]
            values["treebank_attention"] = statistics.result()
        if self.blimp is not None:
            result = self.blimp.evaluate(model, batch_tokens=batch_tokens, after_batch=after_batch)
            values |= {
                "blimp": result["blimp"],
                "blimp_ties": result["num_ties"],
                "blimp_fields": result["fields"],
                "blimp_terms": result["terms"],
                "blimp_sets": {
                    uid: {name: entry[name] for name in ("accuracy", "num_pairs", "ties")}
                    for uid, entry in result["sets"].items()
                },
            }
        return values

    def describe(self, values: dict[str, Any]) -> str:
        """The most important values as a part of a line; "" where nothing was evaluated."""
        names = {"validation_mlm_loss": "validation mlm", "uas": "uas", "blimp": "blimp"}
        shown = "  ".join(f"{label} {values[name]:.4f}" for name, label in names.items() if name in values)
        num_pairs = sum(row["num_pairs"] for row in values.get("blimp_sets", {}).values())
        if values.get("blimp_ties", 0) > MANY_TIES * num_pairs:
            shown += f" (warning: {values['blimp_ties']} ties count as wrong)"
        return shown


def collapsed_attention(values: dict[str, Any]) -> dict[str, Any] | None:
    """What an evaluation measured of attention, if most heads have collapsed: on validation data, else on the treebank.

    A head that attends to little but [SEP] is ordinary in a trained BERT; that most heads do so at once is not.
    """
    attention = values.get("validation_attention", values.get("treebank_attention"))
    return attention if attention is not None and attention["collapsed_heads"] >= MOST_HEADS else None
