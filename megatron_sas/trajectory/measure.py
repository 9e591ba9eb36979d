"""Everything that is measured on each model of a trajectory, in one pass over each input."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_sas.core.cli import InputError
from megatron_sas.core.files import sha256_file
from megatron_sas.data.packed import PackedData
from megatron_sas.data.tokenizer import tokenizer_digest, tokenizer_hash
from megatron_sas.evaluation.batching import deal
from megatron_sas.evaluation.complexity import cls_vectors, intrinsic_dimension, weight_norm
from megatron_sas.evaluation.minimal_pairs import BlimpTask, load_blimp, sha256_folder
from megatron_sas.evaluation.observers import AttentionStatistics, SasObserver, share_pass
from megatron_sas.evaluation.text import TextBatch, open_packed_text, packed_text, unknown_in
from megatron_sas.evaluation.treebank import load_treebank
from megatron_sas.evaluation.uas import TreebankTask, UasObserver, observe_treebank, summarize
from megatron_sas.evaluation.validation import evaluate_validation
from megatron_sas.run.reading import load_model
from megatron_sas.trajectory.points import BlimpItems, Items, UasItems

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megatron_sas.model.bert import Bert, BertOutput
    from megatron_sas.model.config import BertConfig

MASK_PROB = 0.15


@dataclass(frozen=True)
class Inputs:
    """What to measure on; a part whose input is None is left out."""

    treebank: Path | None = None
    treebank_sentences: int | None = None  # the first so many
    blimp: Path | None = None
    blimp_metric: str = "pll"
    pairs_per_set: int | None = None  # the first so many
    text: str | None = None  # prefix of packed data
    text_sequences: int = 1000  # the first so many
    precision: str = "fp32"
    batch_tokens: int = 4096


class TrajectoryTask:
    """All inputs, prepared for models of one tokenizer and shape: edges and pairs are the same for all of them.

    Raises:
        InputError: an input is wrong or does not fit such models.
    """

    def __init__(self, inputs: Inputs, config: BertConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self.inputs = inputs
        self.shape, self.digest = _shape(config, tokenizer), tokenizer_digest(tokenizer)
        max_length = config.max_position_embeddings
        self.treebank: TreebankTask | None = None
        self.blimp: BlimpTask | None = None
        self.text: PackedData | None = None
        if inputs.treebank is not None:
            sentences = load_treebank(inputs.treebank, inputs.treebank_sentences)
            self.treebank = TreebankTask(sentences, tokenizer, max_length)
        if inputs.blimp is not None:
            pairs = load_blimp(inputs.blimp)
            self.blimp = BlimpTask(pairs, tokenizer, inputs.blimp_metric, inputs.pairs_per_set, max_length)
        if inputs.text is not None:
            self.text = open_packed_text(inputs.text, tokenizer, max_length)
            self.num_texts = min(inputs.text_sequences, self.text.num_sequences)
            self.unknown_text = unknown_in(self.text, self.num_texts)

    def settings(self) -> dict[str, Any]:
        """What decides the measurements, as JSON values; checksums rather than paths identify inputs."""
        inputs = self.inputs
        treebank = blimp = text = None
        if self.treebank is not None:
            sentences = len(self.treebank.sentences) + self.treebank.num_skipped
            path = str(inputs.treebank.resolve())
            treebank = {"path": path, "sha256": sha256_file(inputs.treebank), "sentences": sentences}
        if self.blimp is not None:
            blimp = {"path": str(inputs.blimp.resolve()), "sha256": sha256_folder(inputs.blimp)}
            blimp |= {"metric": inputs.blimp_metric, "pairs_per_set": inputs.pairs_per_set}
        if self.text is not None:
            text = {"prefix": str(Path(inputs.text).resolve()), "fingerprint": self.text.fingerprint}
            text |= {"sequences": self.num_texts, "mask_prob": MASK_PROB}
        precision = {"precision": inputs.precision}
        return {"treebank": treebank, "blimp": blimp, "text": text, "model": self.shape, **precision}

    def load(self, path: Path, device: torch.device) -> Bert:
        """A model of the trajectory. Raises `InputError` when it cannot be read or is of another kind."""
        model, tokenizer = load_model(path, device)
        shape = _shape(model.config, tokenizer)
        different = sorted(name for name in shape if shape[name] != self.shape[name])
        if not different and tokenizer_digest(tokenizer) != self.digest:
            different = ["what the tokenizer does"]
        if different:
            raise InputError(f"{path}: differs from the other models in {', '.join(different)}; measure it elsewhere")
        return model

    def measure(self, model: Bert) -> tuple[dict[str, Any], Items]:
        """The numbers of point.json (but `step` and `model`) and the items."""
        started = time.perf_counter()
        values: dict[str, Any] = {"weight_norm": weight_norm(model)}
        uas_items = blimp_items = None
        device = next(model.parameters()).device
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.inputs.precision == "bf16"):
            if self.treebank is not None:
                numbers, uas_items = self._measure_treebank(model, self.treebank)
                values |= numbers
            if self.blimp is not None:
                values["blimp"], blimp_items = self._measure_blimp(model, self.blimp)
            if self.text is not None:
                values |= self._measure_text(model, self.text)
        values["seconds"] = time.perf_counter() - started
        return values, Items(uas_items, blimp_items)

    def _measure_treebank(self, model: Bert, task: TreebankTask) -> tuple[dict[str, Any], UasItems]:
        statistics, sas, uas = task.attention_statistics(), SasObserver(), UasObserver(task, keep_edges=True)
        batches = deal(task.batches(self.inputs.batch_tokens))
        observe_treebank(model, task, batches, [sas, uas], statistics=statistics)
        values = {"uas": summarize(task, uas.counts().cpu().numpy())}
        values |= {**_attention_values(statistics), "sas": sas.result()}
        return values, UasItems(task.edge_list(), uas.edges())

    def _measure_blimp(self, model: Bert, task: BlimpTask) -> tuple[dict[str, Any], BlimpItems]:
        started = time.perf_counter()
        scores = task.pll.score(model, batch_tokens=self.inputs.batch_tokens)
        result = task.summarize(scores, time.perf_counter() - started)
        return result, BlimpItems(task.correct_pairs(scores), task.sets_of_pairs(), [s.uid for s in task.sets])

    def _measure_text(self, model: Bert, packed: PackedData) -> dict[str, Any]:
        """Unmasked text for complexity, SAS on the data's own edges, and entropy if no treebank gives it; then the loss
        on masked text."""
        sizes = {"num_sequences": self.num_texts, "batch_tokens": self.inputs.batch_tokens}
        sas, statistics = SasObserver(), None
        if self.treebank is None:
            statistics = AttentionStatistics(packed.tokenizer.cls_id, packed.tokenizer.sep_id)

        def run(model: Bert, batch: TextBatch) -> BertOutput:
            output = share_pass(model, batch, statistics=statistics, heads=batch.heads)
            sas.add_output(batch.heads, output.to_head, output.to_dependent)
            return output

        vectors = cls_vectors(model, packed_text(packed, **sizes), self.num_texts, run=run)
        values: dict[str, Any] = {"intrinsic_dimension": intrinsic_dimension(vectors, packed.tokens[: self.num_texts])}
        values["text_unknown"] = self.unknown_text.record()
        if statistics is not None:
            values |= _attention_values(statistics)
        if (along := sas.result()) is not None:
            values["text_sas"] = along
        loss = evaluate_validation(model, packed, {}, mask_prob=MASK_PROB, **sizes)
        return {**values, "mlm_loss": loss["validation_mlm_loss"]}


def _attention_values(statistics: AttentionStatistics) -> dict[str, Any]:
    return {f"attention_{name}": value for name, value in statistics.result().items()}


def _shape(config: BertConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What all models of a trajectory have in common."""
    names = ("num_layers", "num_heads", "max_position_embeddings")
    return {"tokenizer": tokenizer_hash(tokenizer), **{name: getattr(config, name) for name in names}}
