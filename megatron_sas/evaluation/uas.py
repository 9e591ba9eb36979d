"""How well single attention heads follow syntactic dependencies: UAS after Clark et al. (2019).

Word-level attention sums over the pieces attended to and averages over the pieces attending. In direction `dep->head`
a word predicts as its head the other word it attends to most; in `head->dep` the other word that attends to it most.
[CLS], [SEP] and the word itself are never predicted, ties go to the first word. Each relation keeps its best (layer,
head, direction).

Deviations from the code of Clark et al.: `root` and `punct` are left out of the overall figure too, and `poss` is
treated like any other relation.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field

from megatron_sas.core.cli import InputError
from megatron_sas.core.distributed import all_reduce_sum_
from megatron_sas.core.files import sha256_file
from megatron_sas.core.settings import Section
from megatron_sas.corpus.readers.trees import blanked_note
from megatron_sas.data.unknown import Unknown
from megatron_sas.evaluation.base import Evaluation, Metric, Resources
from megatron_sas.evaluation.batching import AfterBatch, evaluating, shard_batches
from megatron_sas.evaluation.items import UasItems
from megatron_sas.evaluation.observers import AttentionStatistics, MapObserver, SasObserver, share_pass
from megatron_sas.evaluation.treebank import Sentence, TokenizedSentence, Treebank, load_treebank, tokenize_words
from megatron_sas.model.bert import Bert

DIRECTIONS = ("dep->head", "head->dep")
OFFSETS = (-1, 1, -2, 2, -3, 3)  # nearest first: of equally good baselines the shortest is reported
UNCOUNTED_RELATIONS = frozenset({"root", "punct"})
MIN_EDGES_IN_TABLE = 100

UAS = Metric(
    "uas",
    "UAS, each relation's best head",
    direction=1,
    title="UAS",
    printed="uas",
    point=("uas", "uas"),
    watched=True,
)
BASELINE = Metric("uas_baseline", "UAS of the best fixed offsets", point=("uas", "uas_baseline"))
SINGLE_HEAD = Metric("uas_single_head", "UAS of the best single head", point=("uas", "uas_single_head"))
RELATIONS = Metric("uas_relations", point=("uas", "relations"))


class TreebankTask:
    """A treebank tokenised for one tokenizer and ready to be evaluated many times.

    `sentences` are the `TokenizedSentence`s that fit `max_length` tokens with [CLS] and [SEP], the others are counted
    in `num_skipped` (and in `num_blanked` those that `load_treebank` has left out); sentence n is number `numbers[n]`
    of those given. `unknown` counts the pieces that are [UNK]. `heads[n]` int64 (S,) holds all its dependencies from
    first piece to first piece (-1 = none). Those that count for UAS are `edges[n]`: word `edges[n][0, e]` depends on
    word `edges[n][1, e]` by `relations[edges[n][2, e]]`. `edge_counts` (R,) and `baseline_counts` (R, 6) are int64:
    edges of each relation, and how many of them each of `OFFSETS` (the head is the word that many places further
    right) gets right.

    Raises `InputError` when no sentence fits or none has an edge that counts.
    """

    def __init__(self, sentences: Sequence[Sentence], tokenizer: Any, max_length: int) -> None:
        tokenized = tokenize_words(sentences, tokenizer)
        kept = [index for index, sentence in enumerate(tokenized) if len(sentence.ids) <= max_length]
        if not kept:
            raise InputError(
                f"treebank: no sentence fits the model's maximum of {max_length} tokens; use shorter sentences"
            )
        self.numbers = kept
        self.sentences: list[TokenizedSentence] = [tokenized[index] for index in kept]
        self.heads = [heads_of_pieces(sentences[index], tokenized[index]) for index in kept]
        self.num_skipped = len(sentences) - len(kept)
        self.num_blanked = sentences.num_blanked if isinstance(sentences, Treebank) else 0
        self.pad_token_id: int = tokenizer.pad_token_id
        self.cls_token_id: int = tokenizer.cls_token_id
        self.sep_token_id: int = tokenizer.sep_token_id
        pieces = np.concatenate([sentence.ids[1:-1] for sentence in self.sentences])
        self.unknown = Unknown.of(pieces, tokenizer.unk_token_id)
        counted = [_counted_edges(sentences[index]) for index in kept]
        self.relations: list[str] = sorted({relation for edges in counted for _, _, relation in edges})
        if not self.relations:
            raise InputError(
                "treebank: no dependency to score (root and punct do not count); check heads and relations"
            )
        number = {relation: index for index, relation in enumerate(self.relations)}
        self.edges: list[np.ndarray] = [
            np.array([(dependent, head, number[relation]) for dependent, head, relation in edges], np.int64)
            .reshape(-1, 3)
            .T
            for edges in counted
        ]
        self.first_edges = np.cumsum([0] + [edges.shape[1] for edges in self.edges])  # number of each sentence's first
        dependents, heads, relations = np.concatenate(self.edges, axis=1)
        self.edge_counts = np.bincount(relations, minlength=len(self.relations))
        # A head lies inside its sentence, so an offset that leaves the sentence can never equal it: it counts as wrong.
        self.baseline_counts = np.stack(
            [np.bincount(relations[heads - dependents == offset], minlength=len(self.relations)) for offset in OFFSETS],
            axis=1,
        )

    def edge_list(self) -> np.ndarray:
        """Number of the sentence among those given, and relation, of every edge that counts: int32 (E, 2)."""
        sentences = np.repeat(self.numbers, np.diff(self.first_edges))
        return np.stack([sentences, np.concatenate(self.edges, axis=1)[2]], axis=1).astype(np.int32)

    def batches(self, batch_tokens: int) -> list[np.ndarray]:
        """Indices into `sentences`, longest first, batches of at most `batch_tokens` tokens with padding (or one)."""
        lengths = np.array([len(sentence.ids) for sentence in self.sentences])
        order = np.argsort(-lengths, kind="stable")
        batches, start = [], 0
        while start < len(order):
            size = max(1, batch_tokens // lengths[order[start]])
            batches.append(order[start : start + size])
            start += size
        return batches

    def num_forwards(self, batch_tokens: int) -> int:
        """Forward passes that `evaluate` makes on every rank."""
        return len(shard_batches(self.batches(batch_tokens)))

    def attention_statistics(self) -> AttentionStatistics:
        """What measures attention's entropy on these sentences."""
        return AttentionStatistics(self.cls_token_id, self.sep_token_id)

    def evaluate(self, model: torch.nn.Module, **options: Any) -> dict:
        """`evaluate_uas` of this treebank."""
        return evaluate_uas(model, self, **options)


def evaluate_uas(
    model: torch.nn.Module,
    task: TreebankTask,
    *,
    batch_tokens: int = 4096,
    after_batch: AfterBatch | None = None,
    statistics: AttentionStatistics | None = None,
) -> dict:
    """Accuracy of every attention head at every relation, the best of them per relation, and UAS.

    `model` is called as `model(input_ids, seqlens=..., attention_observer=...)`. The treebank is shared among the
    ranks of the process group and every rank returns the whole result; `after_batch` is called after each of
    `task.num_forwards` passes, which also feed `statistics`.

    Keys: `uas` (edge-weighted mean over all relations of the best head's accuracy), `uas_baseline` (the same of the
    best fixed offset), `uas_single_head` (the best single head over all edges) with `single_head` (which),
    `num_sentences`, `num_skipped`, `num_blanked`, `num_edges`, `unknown` (pieces that are [UNK]), `relations` (by
    falling count: count, accuracy, layer, head, direction, baseline, baseline_offset, in_table) and `counts` with the
    edges that each head got right, nested lists `correct[relation][direction][layer][head]` beside the names on their
    axes. Layers and heads count from 0; of equally good ones the lowest (layer, head) is named, `dep->head` first.
    """
    correct = count_correct(model, task, shard_batches(task.batches(batch_tokens)), after_batch, statistics)
    return summarize(task, all_reduce_sum_(correct).cpu().numpy())


def count_correct(
    model: torch.nn.Module,
    task: TreebankTask,
    batches: Sequence[tuple[np.ndarray, bool]],
    after_batch: AfterBatch | None = None,
    statistics: AttentionStatistics | None = None,
) -> torch.Tensor:
    """Edges that each head gets right in `batches`, int64 (R, 2, L, H) on the model's device."""
    observer = UasObserver(task)
    observe_treebank(model, task, batches, [observer], after_batch, statistics)
    return observer.counts()


def observe_treebank(
    model: torch.nn.Module,
    task: TreebankTask,
    batches: Sequence[tuple[np.ndarray, bool]],
    observers: Sequence[MapObserver],
    after_batch: AfterBatch | None = None,
    statistics: AttentionStatistics | None = None,
) -> None:
    """Show the attention of `batches` to all observers and `statistics`, in one forward pass a batch."""
    with evaluating(model) as device:
        for indices, counts in batches:
            share_pass(model, TreebankBatch(task, indices, counts, device), observers, statistics)
            if after_batch is not None:
                after_batch()


def word_attention(probs: torch.Tensor, owner: torch.Tensor, num_words: int) -> torch.Tensor:
    """Attention between words from attention between pieces (Clark et al. 2019, section 4.1).

    `probs` float32 (B, H, S, S); `owner` int64 (B, S), the word of each piece, `num_words` for pieces of none. Returns
    float32 (B, H, W, W): summed over the pieces attended to, averaged over the pieces attending; 0 for words without
    pieces.

    Scattered rather than multiplied by indicator matrices: some 30 times as fast on a CPU, and free of the reduced
    precision (TF32, autocast) that a training loop may have chosen for matrix products.
    """
    batch, heads, seq, _ = probs.shape
    columns = owner[:, None, None, :].expand(batch, heads, seq, seq)
    to_words = probs.new_zeros(batch, heads, seq, num_words + 1).scatter_add_(3, columns, probs)
    rows = owner[:, None, :, None].expand_as(to_words)
    words = probs.new_zeros(batch, heads, num_words + 1, num_words + 1).scatter_add_(2, rows, to_words)
    pieces = probs.new_zeros(batch, num_words + 1).scatter_add_(1, owner, probs.new_ones(batch, seq)).clamp(min=1)
    return (words / pieces[:, None, :, None])[:, :, :-1, :-1]


def predicted_heads(words: torch.Tensor, excluded: torch.Tensor) -> torch.Tensor:
    """The word that each head takes for the head of each word, int64 (2, B, H, W), by `DIRECTIONS`.

    `words` (B, H, W, W) is what `word_attention` returns; `excluded`, bool and broadcast to it, is true where word w
    may not be given word v: itself and padding.
    """
    words = words.masked_fill(excluded, -1.0)
    # Of equal values torch documents the first.
    return torch.stack([attention.argmax(dim=-1) for attention in (words, words.transpose(-1, -2))])


class TreebankBatch:
    """Tensors of one batch of sentences on the model's device. Without `counts` it has no edges."""

    def __init__(self, task: TreebankTask, indices: np.ndarray, counts: bool, device: torch.device) -> None:
        sentences = [task.sentences[index] for index in indices]
        lengths = np.array([len(sentence.ids) for sentence in sentences])
        num_words = np.array([sentence.num_words for sentence in sentences])
        seq, words = int(lengths.max()), int(num_words.max())
        ids = np.full((len(sentences), seq), task.pad_token_id, np.int64)
        owner = np.full((len(sentences), seq), words, np.int64)
        heads = np.full((len(sentences), seq), -1, np.int64)
        for row, (index, sentence) in enumerate(zip(indices, sentences, strict=True)):
            ids[row, : len(sentence.ids)] = sentence.ids
            heads[row, : len(sentence.ids)] = task.heads[index]
            owner[row, : len(sentence.ids)] = np.where(sentence.words < 0, words, sentence.words)
        edges = [task.edges[index] + np.array([[row * words], [0], [0]]) for row, index in enumerate(indices)]
        rows, gold, relation = np.concatenate(edges, axis=1)[:, : None if counts else 0]
        numbers = np.concatenate([np.arange(task.first_edges[i], task.first_edges[i + 1]) for i in indices])

        def to_device(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        self.counts = counts
        self.input_ids, self.heads = to_device(ids), to_device(heads)
        self.seqlens = None if (lengths == seq).all() else to_device(lengths)
        self.owner, self.num_words = to_device(owner), words
        absent = np.arange(words) >= num_words[:, None]
        itself = np.eye(words, dtype=bool)
        self.excluded = to_device(itself | absent[:, None, :] | absent[:, :, None])[:, None]  # (B, 1, W, W)
        self.rows, self.gold, self.relation = to_device(rows), to_device(gold), to_device(relation)  # each (edges,)
        self.edge_numbers = torch.from_numpy(numbers[: None if counts else 0])  # int64 (edges,) on the CPU


class UasObserver:
    """Adds up the edges that each head gets right, and with `keep_edges` remembers which these are."""

    def __init__(self, task: TreebankTask, keep_edges: bool = False) -> None:
        self._task, self._keep_edges = task, keep_edges
        self._counts: dict[int, torch.Tensor] = {}  # int64 (2, R, H) by layer
        self._edges: dict[int, torch.Tensor] = {}  # bool (E, 2, H) by layer, on the CPU

    def observe(self, batch: TreebankBatch, layer: int, probs: torch.Tensor) -> None:
        """See `MapObserver`."""
        num_heads = probs.shape[1]
        words = word_attention(probs, batch.owner, batch.num_words)
        if layer not in self._counts:
            shape = (2, len(self._task.relations), num_heads)
            self._counts[layer] = torch.zeros(shape, dtype=torch.int64, device=probs.device)
            if self._keep_edges:
                self._edges[layer] = torch.zeros(int(self._task.edge_counts.sum()), 2, num_heads, dtype=torch.bool)
        for direction, predicted in enumerate(predicted_heads(words, batch.excluded)):  # (B, H, W)
            predicted = predicted.transpose(1, 2).reshape(-1, num_heads)[batch.rows]  # (edges, H)
            correct = predicted == batch.gold.unsqueeze(1)
            self._counts[layer][direction].index_add_(0, batch.relation, correct.long())
            if self._keep_edges:
                self._edges[layer][batch.edge_numbers, direction] = correct.cpu()

    def end_batch(self, batch: TreebankBatch) -> None:
        """Nothing is left to do after the last layer."""

    def counts(self) -> torch.Tensor:
        """Right edges by relation, int64 (R, 2, L, H) on the model's device."""
        layers = [self._counts[layer] for layer in sorted(self._counts)]
        return torch.stack(layers).permute(2, 1, 0, 3).contiguous()

    def edges(self) -> np.ndarray:
        """Whether each edge is right, bool (E, 2, L, H) in the order of `TreebankTask.edge_list`."""
        return torch.stack([self._edges[layer] for layer in sorted(self._edges)], dim=2).numpy()


def summarize(task: TreebankTask, correct: np.ndarray) -> dict:
    """The result of `evaluate_uas` from `correct`, int64 (R, 2, L, H)."""
    relations, best_correct = {}, 0
    for index in sorted(
        range(len(task.relations)), key=lambda index: (-task.edge_counts[index], task.relations[index])
    ):
        count = int(task.edge_counts[index])
        hits, place = _best(correct[index])
        offset = int(task.baseline_counts[index].argmax())
        best_correct += hits
        relations[task.relations[index]] = {
            "count": count,
            "accuracy": hits / count,
            **place,
            "baseline": int(task.baseline_counts[index, offset]) / count,
            "baseline_offset": OFFSETS[offset],
            "in_table": count >= MIN_EDGES_IN_TABLE,
        }
    num_edges = int(task.edge_counts.sum())
    single_hits, single_head = _best(correct.sum(axis=0))
    return {
        UAS.key: best_correct / num_edges,
        BASELINE.key: int(task.baseline_counts.max(axis=1).sum()) / num_edges,
        SINGLE_HEAD.key: single_hits / num_edges,
        "single_head": single_head,
        "num_sentences": len(task.sentences),
        "num_skipped": task.num_skipped,
        "num_blanked": task.num_blanked,
        "num_edges": num_edges,
        "unknown": task.unknown.record(),
        "relations": relations,
        "counts": {"relations": task.relations, "directions": list(DIRECTIONS), "correct": correct.tolist()},
    }


def _best(correct: np.ndarray) -> tuple[int, dict]:
    """The highest of int64 (2, L, H) and its place; the lowest (layer, head, direction) among equals."""
    layer, head, direction = np.unravel_index(correct.transpose(1, 2, 0).argmax(), correct.transpose(1, 2, 0).shape)
    place = {"layer": int(layer), "head": int(head), "direction": DIRECTIONS[direction]}
    return int(correct[direction, layer, head]), place


def heads_of_pieces(sentence: Sentence, tokenized: TokenizedSentence) -> np.ndarray:
    """int64 (S,): where the first piece of a word has a head, that word's first piece; elsewhere -1."""
    first = np.array([np.argmax(tokenized.words == word) for word in range(tokenized.num_words)])
    heads = np.full(len(tokenized.ids), -1, np.int64)
    for word, head in enumerate(sentence.heads):
        if head >= 0:
            heads[first[word]] = first[head]
    return heads


def _counted_edges(sentence: Sentence) -> list[tuple[int, int, str]]:
    """(dependent, head, relation without subtype) of every word whose relation counts."""
    edges = []
    for dependent, (head, full_relation) in enumerate(zip(sentence.heads, sentence.deprels, strict=True)):
        relation = full_relation.split(":")[0]
        if head >= 0 and relation.lower() not in UNCOUNTED_RELATIONS:
            edges.append((dependent, head, relation))
    return edges


class UasSettings(Section):
    """Of the treebank."""

    treebank: str | None = Field(None, description="CoNLL-U or JSON lines for UAS")
    treebank_sentences: int | None = Field(None, description="use the first so many sentences", ge=1)


class UasEvaluation(Evaluation):
    """UAS on a treebank, and attention on its sentences."""

    settings = UasSettings
    metrics = (UAS, BASELINE, SINGLE_HEAD, RELATIONS)
    input = "treebank"
    items = UasItems
    item_counts = (RELATIONS.key, "count")

    @classmethod
    def wanted(cls, section: UasSettings) -> bool:
        """Where a treebank is given."""
        return section.treebank is not None

    @classmethod
    def preview(cls, section: UasSettings) -> tuple[str, list[str]]:
        """See `Evaluation`."""
        treebank, limit = load_treebank(section.treebank), section.treebank_sentences
        size, short = len(treebank), []
        if limit is not None and size < limit:
            short = [f"treebank_sentences: {limit} are wanted, but the treebank has {size}"]
        used = "" if limit is None or size <= limit else f", the first {limit} are used"
        return "; ".join(filter(None, (f"{size} sentences{used}", blanked_note(treebank.num_blanked)))), short

    def __init__(self, section: Any, resources: Resources) -> None:
        super().__init__(section, resources)
        sentences = load_treebank(section.treebank, section.treebank_sentences)
        self.task = TreebankTask(sentences, resources.tokenizer, resources.max_length)
        self.unknown = self.task.unknown

    def run(self, model: Bert, after_batch: AfterBatch | None = None) -> dict[str, Any]:
        """See `Evaluation`; with `treebank_attention`, as `AttentionStatistics` gives it."""
        statistics = self.task.attention_statistics()
        options = {"batch_tokens": self.section.batch_tokens, "after_batch": after_batch, "statistics": statistics}
        result = self.task.evaluate(model, **options)
        values = {metric.key: result[metric.point[-1]] for metric in self.metrics}
        return {**values, "treebank_attention": statistics.result()}

    def measure(self, model: Bert) -> tuple[dict[str, Any], UasItems]:
        """Also SAS and attention's entropy on these sentences, in the same pass."""
        task = self.task
        statistics, sas, uas = task.attention_statistics(), SasObserver(), UasObserver(task, keep_edges=True)
        batches = shard_batches(task.batches(self.section.batch_tokens))
        observe_treebank(model, task, batches, [sas, uas], statistics=statistics)
        values = {UAS.point[0]: summarize(task, uas.counts().cpu().numpy()), **statistics.point(), "sas": sas.result()}
        return values, UasItems(task.edge_list(), uas.edges())

    def source(self) -> dict[str, Any]:
        """See `Evaluation`."""
        path = Path(self.section.treebank)
        sentences = len(self.task.sentences) + self.task.num_skipped
        return {"path": str(path.resolve()), "sha256": sha256_file(path), "sentences": sentences}

    def facts(self) -> dict[str, Any]:
        """See `Evaluation`."""
        blanked = self.task.num_blanked
        return {"treebank_sentences_blanked": blanked} if blanked else {}

    def notes(self) -> list[str]:
        """See `Evaluation`."""
        return [blanked_note(self.task.num_blanked)] if self.task.num_blanked else []
