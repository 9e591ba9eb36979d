"""How well single attention heads follow syntactic dependencies: UAS after Clark et al. (2019).

Word-level attention sums over the tokens attended to and averages over the tokens attending. In direction `dep->head`
a word predicts as its head the other word it attends to most; in `head->dep` the other word that attends to it most.
[CLS], [SEP] and the word itself are never predicted, ties go to the first word. Each relation keeps its best (layer,
head, direction).

Deviations from the code of Clark et al.: `root` and `punct` are left out of the overall figure too, and `poss` is
treated like any other relation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megatron_sas.core.cli import InputError
from megatron_sas.core.distributed import all_reduce_sum_
from megatron_sas.core.files import sha256_file
from megatron_sas.core.settings import Section
from megatron_sas.corpus.readers.trees import blanked_note
from megatron_sas.data.unknown import Unknown
from megatron_sas.evaluation.base import Evaluation, Metric, Resources
from megatron_sas.evaluation.batching import Encoder, TokenBatch, evaluating, shard_batches
from megatron_sas.evaluation.items import UasItems
from megatron_sas.evaluation.observers import AttentionStatistics, Observer, SasOfMaps, share_pass
from megatron_sas.evaluation.treebank import Sentence, TokenizedSentence, load_treebank, tokenize_words

DIRECTIONS = ("dep->head", "head->dep")
OFFSETS = (-1, 1, -2, 2, -3, 3)  # nearest first: of equally good baselines the shortest is reported
UNCOUNTED_RELATIONS = frozenset({"root", "punct"})
MIN_EDGES_IN_TABLE = 100

UAS = Metric("uas", "UAS, each relation's best head", 1, title="UAS", printed="uas", point=("uas", "uas"), watched=True)
BASELINE = Metric("uas_baseline", "UAS of the best fixed offsets", point=("uas", "uas_baseline"))
SINGLE_HEAD = Metric("uas_single_head", "UAS of the best single head", point=("uas", "uas_single_head"))
RELATIONS = Metric("uas_relations", point=("uas", "relations"))


class TreebankTask:
    """A treebank tokenised for one tokenizer and ready to be evaluated many times.

    `sentences` are the `TokenizedSentence`s that fit `max_length` tokens with [CLS] and [SEP], the others are counted
    in `num_skipped` (and in `num_blanked` those that `load_treebank` has left out); sentence n is number `numbers[n]`
    of those given. `unknown` counts the tokens that are [UNK]. `dep_heads[n]` int64 (S,) holds all its dependencies
    from first token to first token (-1 = none).

    Those that count for UAS are rows of `edges`, int64 (E, 4): in sentence n, word d depends on word h by
    `relations[r]`. `edge_counts` (R,) and `baseline_counts` (R, 6) are int64: edges of each relation, and how many of
    them each of `OFFSETS` (the head is the word that many places further right) gets right.

    Raises `InputError` when no sentence fits or none has an edge that counts.
    """

    def __init__(self, sentences: Sequence[Sentence], tokenizer: Any, max_length: int) -> None:
        tokenized = tokenize_words(sentences, tokenizer)
        kept = [index for index, sentence in enumerate(tokenized) if len(sentence.ids) <= max_length]
        if not kept:
            raise InputError(
                f"treebank: no sentence fits the model's maximum of {max_length} tokens; use shorter sentences"
            )
        self.numbers = np.array(kept)
        self.sentences: list[TokenizedSentence] = [tokenized[index] for index in kept]
        self.dep_heads = [dep_heads_of_tokens(sentences[index], tokenized[index]) for index in kept]
        self.num_skipped = len(sentences) - len(kept)
        self.num_blanked: int = getattr(sentences, "num_blanked", 0)
        self.pad_token_id: int = tokenizer.pad_token_id
        self.special_ids: tuple[int, int] = (tokenizer.cls_token_id, tokenizer.sep_token_id)
        tokens = np.concatenate([sentence.ids[1:-1] for sentence in self.sentences])
        self.unknown = Unknown.of(tokens, tokenizer.unk_token_id)
        edges = [(n, *edge) for n, index in enumerate(kept) for edge in _counted_edges(sentences[index])]
        if not edges:
            raise InputError(
                "treebank: no dependency to score (root and punct do not count); check heads and relations"
            )
        self.relations: list[str] = sorted({relation for *_, relation in edges})
        number = {relation: index for index, relation in enumerate(self.relations)}
        self.edges = np.array([(n, dependent, head, number[name]) for n, dependent, head, name in edges], np.int64)
        self._edge_of_word = [np.full(sentence.num_words, -1) for sentence in self.sentences]  # its number, -1 = none
        for edge, (n, dependent, *_) in enumerate(edges):
            self._edge_of_word[n][dependent] = edge
        _, dependents, heads, relations = self.edges.T
        self.edge_counts = np.bincount(relations)
        # A head lies inside its sentence, so an offset that leaves the sentence can never equal it: it counts as wrong.
        self.baseline_counts = np.stack(
            [np.bincount(relations[heads - dependents == offset], minlength=len(number)) for offset in OFFSETS], axis=1
        )

    def edge_list(self) -> np.ndarray:
        """Number of the sentence among those given, and relation, of every edge that counts: int32 (E, 2)."""
        return np.stack([self.numbers[self.edges[:, 0]], self.edges[:, 3]], axis=1).astype(np.int32)

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
        return AttentionStatistics(*self.special_ids)

    def evaluate(self, model: Encoder, *, batch_tokens: int = 4096, observers: Sequence[Observer] = ()) -> dict:
        """Accuracy of every attention head at every relation, the best of them per relation, and UAS.

        The treebank is shared among the ranks of the process group and every rank returns the whole result.
        `observers` see the same forward passes.

        Keys: `uas` (edge-weighted mean over all relations of the best head's accuracy), `uas_baseline` (the same of
        the best fixed offset), `uas_single_head` (the best single head over all edges) with `single_head` (which),
        `num_sentences`, `num_skipped`, `num_blanked`, `num_edges`, `unknown` (tokens that are [UNK]), `relations` (by
        falling count: count, accuracy, layer, head, direction, baseline, baseline_offset, in_table) and `counts` with
        the edges that each head got right, nested lists `correct[relation][direction][layer][head]` and the names on
        their axes. Layers and heads count from 0; of equally good ones the lowest (layer, head) is named,
        `dep->head` first.
        """
        uas = UasObserver(self)
        self.observe(model, shard_batches(self.batches(batch_tokens)), [uas, *observers])
        return self.summarize(uas.counts())

    def observe(
        self, model: Encoder, batches: Sequence[tuple[np.ndarray, bool]], observers: Sequence[Observer]
    ) -> None:
        """Show the attention of `batches` to all observers, in one forward pass a batch."""
        with evaluating(model) as device:
            for indices, counts in batches:
                share_pass(model, self._batch(indices, counts, device), observers)

    def _batch(self, indices: np.ndarray, counts: bool, device: torch.device) -> TreebankBatch:
        """The sentences `indices`; a batch that does not count has no edges."""
        sentences = [self.sentences[index] for index in indices]
        lengths = torch.tensor([len(sentence.ids) for sentence in sentences])
        num_words = torch.tensor([sentence.num_words for sentence in sentences])
        most = int(num_words.max())
        owner = _padded([sentence.words for sentence in sentences], -1)
        absent = torch.arange(most) >= num_words[:, None]
        excluded = torch.eye(most, dtype=torch.bool) | absent[:, None, :] | absent[:, :, None]
        edges = _padded([self._edge_of_word[index] for index in indices], -1).flatten()  # (B·W,)
        rows = torch.nonzero(edges >= 0)[: None if counts else 0, 0]
        gold, relation = torch.from_numpy(self.edges)[edges[rows], 2:].T
        return TreebankBatch(
            input_ids=_padded([sentence.ids for sentence in sentences], self.pad_token_id).to(device),
            dep_heads=_padded([self.dep_heads[index] for index in indices], -1).to(device),
            counts=counts,
            seqlens=None if bool((lengths == lengths.max()).all()) else lengths.to(device),
            owner=owner.masked_fill(owner < 0, most).to(device),
            num_words=most,
            excluded=excluded[:, None].to(device),
            rows=rows.to(device),
            gold=gold.to(device),
            relation=relation.to(device),
            edge_numbers=edges[rows],
        )

    def summarize(self, correct: np.ndarray) -> dict:
        """The result of `evaluate` from `correct`, int64 (R, 2, L, H)."""
        relations, best_correct = {}, 0
        for index in sorted(range(len(correct)), key=lambda i: (-self.edge_counts[i], self.relations[i])):
            count = int(self.edge_counts[index])
            hits, place = _best(correct[index])
            offset = int(self.baseline_counts[index].argmax())
            best_correct += hits
            relations[self.relations[index]] = {
                "count": count,
                "accuracy": hits / count,
                **place,
                "baseline": int(self.baseline_counts[index, offset]) / count,
                "baseline_offset": OFFSETS[offset],
                "in_table": count >= MIN_EDGES_IN_TABLE,
            }
        num_edges = len(self.edges)
        single_hits, single_head = _best(correct.sum(axis=0))
        return {
            UAS.key: best_correct / num_edges,
            BASELINE.key: int(self.baseline_counts.max(axis=1).sum()) / num_edges,
            SINGLE_HEAD.key: single_hits / num_edges,
            "single_head": single_head,
            "num_sentences": len(self.sentences),
            "num_skipped": self.num_skipped,
            "num_blanked": self.num_blanked,
            "num_edges": num_edges,
            "unknown": self.unknown.record(),
            "relations": relations,
            "counts": {"relations": self.relations, "directions": list(DIRECTIONS), "correct": correct.tolist()},
        }


def word_attention(probs: Tensor, owner: Tensor, num_words: int) -> Tensor:
    """Attention between words from attention between tokens (Clark et al. 2019, section 4.1).

    `probs` float32 (B, H, S, S); `owner` int64 (B, S), the word of each token, `num_words` for tokens of none. Returns
    float32 (B, H, W, W): summed over the tokens attended to, averaged over the tokens attending; 0 for words without
    tokens.

    Scattered rather than multiplied by indicator matrices: some 30 times as fast on a CPU, and free of the reduced
    precision (TF32, autocast) that a training loop may have chosen for matrix products.
    """
    batch, heads, seq, _ = probs.shape
    columns = owner[:, None, None, :].expand(batch, heads, seq, seq)
    to_words = probs.new_zeros(batch, heads, seq, num_words + 1).scatter_add_(3, columns, probs)
    rows = owner[:, None, :, None].expand_as(to_words)
    words = probs.new_zeros(batch, heads, num_words + 1, num_words + 1).scatter_add_(2, rows, to_words)
    tokens = probs.new_zeros(batch, num_words + 1).scatter_add_(1, owner, probs.new_ones(batch, seq)).clamp(min=1)
    return (words / tokens[:, None, :, None])[:, :, :-1, :-1]


def predicted_heads(words: Tensor, excluded: Tensor) -> Tensor:
    """The word that each head takes for the head of each word, int64 (2, B, H, W), by `DIRECTIONS`.

    `words` (B, H, W, W) is what `word_attention` returns; `excluded`, bool and broadcast to it, is true where word w
    may not be given word v: itself and padding.
    """
    words = words.masked_fill(excluded, -1.0)
    # Of equal values torch documents the first.
    return torch.stack([attention.argmax(dim=-1) for attention in (words, words.transpose(-1, -2))])


@dataclass(frozen=True, kw_only=True)
class TreebankBatch(TokenBatch):
    """B sentences of at most W words, and their edges that count, none where the batch does not."""

    owner: Tensor  # int64 (B, S), the word of each token, W for tokens of none
    num_words: int  # W
    excluded: Tensor  # bool (B, 1, W, W), see `predicted_heads`
    rows: Tensor  # int64 (edges,), dependents as flat indices into (B, W)
    gold: Tensor  # int64 (edges,), their heads
    relation: Tensor  # int64 (edges,)
    edge_numbers: Tensor  # int64 (edges,) on the CPU, rows of `TreebankTask.edges`


def _padded(rows: Sequence[np.ndarray], value: int) -> Tensor:
    return pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True, padding_value=value)


class UasObserver(Observer):
    """Adds up the edges that each head gets right, and with `keep_edges` remembers which these are."""

    def __init__(self, task: TreebankTask, keep_edges: bool = False) -> None:
        self._task, self._keep_edges = task, keep_edges
        self._counts: dict[int, Tensor] = {}  # int64 (2, R, H) by layer
        self._edges: dict[int, Tensor] = {}  # bool (E, 2, H) by layer, on the CPU

    def observe(self, batch: TreebankBatch, layer: int, *seen: Tensor) -> None:
        """See `Observer`."""
        (probs,) = seen
        num_heads = probs.shape[1]
        words = word_attention(probs, batch.owner, batch.num_words)
        if layer not in self._counts:
            shape = (2, len(self._task.relations), num_heads)
            self._counts[layer] = torch.zeros(shape, dtype=torch.int64, device=probs.device)
            if self._keep_edges:
                self._edges[layer] = torch.zeros(len(self._task.edges), 2, num_heads, dtype=torch.bool)
        for direction, predicted in enumerate(predicted_heads(words, batch.excluded)):  # (B, H, W)
            predicted = predicted.transpose(1, 2).reshape(-1, num_heads)[batch.rows]  # (edges, H)
            correct = predicted == batch.gold.unsqueeze(1)
            self._counts[layer][direction].index_add_(0, batch.relation, correct.long())
            if self._keep_edges:
                self._edges[layer][batch.edge_numbers, direction] = correct.cpu()

    def counts(self) -> np.ndarray:
        """Right edges by relation, int64 (R, 2, L, H). A collective: every rank gets those of all ranks."""
        counts = torch.stack([self._counts[layer] for layer in sorted(self._counts)])  # (L, 2, R, H)
        return all_reduce_sum_(counts.permute(2, 1, 0, 3).contiguous()).cpu().numpy()

    def edges(self) -> np.ndarray:
        """Whether each edge is right, bool (E, 2, L, H) in the order of `TreebankTask.edges`."""
        return torch.stack([self._edges[layer] for layer in sorted(self._edges)], dim=2).numpy()


def _best(correct: np.ndarray) -> tuple[int, dict]:
    """The highest of int64 (2, L, H) and its place; the lowest (layer, head, direction) among equals."""
    layer, head, direction = np.unravel_index(correct.transpose(1, 2, 0).argmax(), correct.transpose(1, 2, 0).shape)
    place = {"layer": int(layer), "head": int(head), "direction": DIRECTIONS[direction]}
    return int(correct[direction, layer, head]), place


def dep_heads_of_tokens(sentence: Sentence, tokenized: TokenizedSentence) -> np.ndarray:
    """int64 (S,): where the first token of a word has a head, that word's first token; elsewhere -1."""
    _, first = np.unique(tokenized.words, return_index=True)
    first = first[1:]  # without [CLS], whose word is -1
    words = np.flatnonzero(np.array(sentence.heads) >= 0)
    dep_heads = np.full(len(tokenized.ids), -1, np.int64)
    dep_heads[first[words]] = first[np.array(sentence.heads)[words]]
    return dep_heads


def _counted_edges(sentence: Sentence) -> list[tuple[int, int, str]]:
    """(dependent, head, relation without subtype) of every word whose relation counts."""
    words = enumerate(zip(sentence.heads, sentence.deprels, strict=True))
    edges = [(dependent, head, name.split(":")[0]) for dependent, (head, name) in words if head >= 0]
    return [edge for edge in edges if edge[2].lower() not in UNCOUNTED_RELATIONS]


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

    def run(self, model: Encoder) -> dict[str, Any]:
        """See `Evaluation`; with `treebank_attention`, as `AttentionStatistics` gives it."""
        statistics = self.task.attention_statistics()
        result = self.task.evaluate(model, batch_tokens=self.section.batch_tokens, observers=[statistics])
        values = {metric.key: result[metric.point[-1]] for metric in self.metrics}
        return {**values, "treebank_attention": statistics.result()}

    def measure(self, model: Encoder) -> tuple[dict[str, Any], UasItems]:
        """Also SAS and attention's entropy on these sentences, in the same pass."""
        task = self.task
        statistics, sas, uas = task.attention_statistics(), SasOfMaps(), UasObserver(task, keep_edges=True)
        task.observe(model, shard_batches(task.batches(self.section.batch_tokens)), [sas, uas, statistics])
        values = {UAS.point[0]: task.summarize(uas.counts()), **statistics.point(), "sas": sas.result()}
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
