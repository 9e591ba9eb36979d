"""What a page shows of a model: best heads per relation, what they find in some sentences, attention of a few heads."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from megatron_sas.core.cli import InputError
from megatron_sas.corpus.inspect.drawing import levels
from megatron_sas.evaluation.sentence import word_maps
from megatron_sas.evaluation.treebank import Sentence, TokenizedSentence, tokenize_words
from megatron_sas.evaluation.uas import DIRECTIONS, UNCOUNTED_RELATIONS, TreebankTask, predicted_heads
from megatron_sas.model.base import MaskedLM

MAX_ATTENTION_BYTES = 24 * 2**20  # of a page, in base64: a browser opens that at once, and mail programs still take it
Place = tuple[int, int]  # (layer, head), both from 0


@dataclass(frozen=True)
class ModelView:
    """One model's part of a page. `relations` are those of `TreebankTask.evaluate`; `predictions` and `attention` have
    one entry per sentence, see `predict` and `quantise`."""

    uas: float
    uas_baseline: float
    relations: dict[str, dict[str, Any]]
    predictions: list[dict[str, list[int]]]
    attention: list[str]


def choose_sentences(
    sentences: Sequence[Sentence], tokenizer: PreTrainedTokenizerBase, max_length: int, limit: int
) -> tuple[list[Sentence], list[TokenizedSentence]]:
    """The first `limit` sentences that can be shown, and the same cut into tokens.

    They have an edge that counts and at most `max_length` tokens with [CLS] and [SEP]. Raises `InputError` when there
    is none.
    """
    kept = [sentence for sentence in sentences if shown_relations([sentence])]
    pairs = zip(kept, tokenize_words(kept, tokenizer), strict=True)
    pairs = [(sentence, tokens) for sentence, tokens in pairs if len(tokens.ids) <= max_length][:limit]
    if not pairs:
        raise InputError(
            f"--sentences: none of {len(sentences)} has an edge (root and punct do not count) and fits the model's "
            f"maximum of {max_length} tokens; give others"
        )
    return [sentence for sentence, _ in pairs], [tokens for _, tokens in pairs]


def counted_relations(sentence: Sentence) -> list[str | None]:
    """Of each word, the relation that a best head is chosen for: without subtype; None where UAS does not count it."""
    names = [deprel.split(":")[0] for deprel in sentence.deprels]
    return [
        name if head >= 0 and name.lower() not in UNCOUNTED_RELATIONS else None
        for head, name in zip(sentence.heads, names, strict=True)
    ]


def shown_relations(sentences: Sequence[Sentence]) -> Counter[str]:
    """How many edges that count the sentences have by each relation."""
    return Counter(name for sentence in sentences for name in counted_relations(sentence) if name is not None)


def serving_heads(sentences: Sequence[Sentence], relations: dict[str, dict[str, Any]], most: int) -> list[Place]:
    """The best heads for the relations that occur in `sentences`, the relation with most edges there first."""
    edges = shown_relations(sentences)
    served = [relations[name] for name, _ in edges.most_common() if name in relations]
    return list(dict.fromkeys((row["layer"], row["head"]) for row in served))[:most]


def check_size(num_models: int, num_heads: int, sentences: Sequence[Sentence]) -> None:
    """Refuse a page whose attention takes more than `MAX_ATTENTION_BYTES`, before any of it is computed."""
    size = num_models * num_heads * sum(len(s.words) * (len(s.words) + 1) for s in sentences) * 4 // 3
    if size > MAX_ATTENTION_BYTES:
        raise InputError(
            f"--sentences: attention of {num_heads} heads in {len(sentences)} sentences over {num_models} models takes "
            f"up to {size / 2**20:.0f} MiB, a page may take {MAX_ATTENTION_BYTES // 2**20}; lower --limit, "
            "--max-models or --max-heads, or give shorter sentences"
        )


def view(
    model: MaskedLM,
    task: TreebankTask,
    sentences: Sequence[Sentence],
    tokenized: Sequence[TokenizedSentence],
    heads: Sequence[Place] | None,
    max_heads: int,
    batch_tokens: int,
) -> tuple[ModelView, list[Place]]:
    """One model's part of a page, and the heads whose attention it holds: `heads`, or those that serve this model."""
    result = task.evaluate(model, batch_tokens=batch_tokens)
    relations = result["relations"]
    heads = serving_heads(sentences, relations, max_heads) if heads is None else list(heads)
    predictions, attention = [], []
    for sentence, tokens in zip(sentences, tokenized, strict=True):
        maps = word_maps(model, tokens)
        predictions.append(predict(sentence, maps, relations))
        attention.append(quantise(maps, heads))
    return ModelView(result["uas"], result["uas_baseline"], relations, predictions, attention), heads


def predict(sentence: Sentence, maps: torch.Tensor, relations: dict[str, dict[str, Any]]) -> dict[str, list[int]]:
    """What the best head of each word's relation takes for its head: lists over words.

    `head`: the word, -1 where the relation has no best head (root, punct, or absent from the treebank); `weight`: its
    attention in thousandths; `level`: the height at which to draw the arc, from 1 (0 for none).
    """
    num_words = len(sentence.words)
    predicted = predicted_heads(maps, torch.eye(num_words, dtype=torch.bool))
    head, weight = [-1] * num_words, [0] * num_words
    for word, name in enumerate(counted_relations(sentence)):
        best = relations.get(name)
        if best is None:
            continue
        direction = DIRECTIONS.index(best["direction"])
        layer, number = best["layer"], best["head"]
        head[word] = int(predicted[direction, layer, number, word])
        attending, attended = (word, head[word]) if direction == 0 else (head[word], word)
        weight[word] = round(1000 * float(maps[layer, number, attending, attended]))
    return {"head": head, "weight": weight, "level": word_levels(head)}


def word_levels(heads: Sequence[int]) -> list[int]:
    """Heights at which arcs from `heads` (-1: none) to their words do not hide each other; 0 where there is none."""
    edges = [(word, head, "") for word, head in enumerate(heads) if head >= 0]
    result = [0] * len(heads)
    for (word, _, _), level in zip(edges, levels(edges), strict=True):
        result[word] = level
    return result


def quantise(maps: torch.Tensor, heads: Sequence[Place]) -> str:
    """Attention maps (layers, heads, W, W) over W words, of some heads: base64 of uint8 (heads, W, W + 1), in 255ths.

    Row i is what word i attends to; the last column what it gives to [CLS] and [SEP].
    """
    chosen = torch.stack([maps[place] for place in heads]) if heads else maps[0, :0]
    special = (1 - chosen.sum(dim=-1, keepdim=True)).clamp(min=0)
    quantised = (torch.cat([chosen, special], dim=-1) * 255).round().clamp(max=255).to(torch.uint8)
    return base64.b64encode(quantised.numpy().tobytes()).decode("ascii")
