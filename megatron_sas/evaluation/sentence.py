"""What a model's attention does in one sentence: between pieces, between words, and along the edges of a tree.

L layers, H attention heads, S pieces with [CLS] and [SEP], W words. Each word is cut into pieces by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from megatron_sas.core.cli import InputError
from megatron_sas.evaluation.batching import evaluating
from megatron_sas.evaluation.treebank import Sentence, TokenizedSentence, tokenize_words
from megatron_sas.evaluation.uas import heads_of_pieces, word_attention
from megatron_sas.model.base import MaskedLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def attention_maps(
    model: MaskedLM, tokenizer: PreTrainedTokenizerBase, words: Sequence[str]
) -> tuple[list[str], Tensor]:
    """The pieces of a sentence, and the attention between them: `[l, h, i, j]` is what piece i gives to piece j.

    Returns:
        S pieces, and float32 `(L, H, S, S)` on the CPU, before dropout; rows sum to 1.

    Raises:
        InputError: the sentence is longer than the model can take.
    """
    tokenized = _tokenize(model, tokenizer, Sentence(words, [-1] * len(words), [""] * len(words)))
    layers: list[Tensor] = []
    with evaluating(model) as device:
        ids = torch.from_numpy(tokenized.ids)[None].to(device)  # (1, S)
        model(ids, attention_observer=lambda _, probs: layers.append(probs[0]))
    return tokenizer.convert_ids_to_tokens(tokenized.ids.tolist()), torch.stack(layers).cpu()


def word_maps(model: MaskedLM, sentence: TokenizedSentence) -> Tensor:
    """Attention between the words of a sentence, float32 `(L, H, W, W)` on the CPU; see `word_attention`."""
    layers: list[Tensor] = []
    with evaluating(model) as device:
        owner = np.where(sentence.words < 0, sentence.num_words, sentence.words)
        ids, owner = (torch.from_numpy(array)[None].to(device) for array in (sentence.ids, owner))
        model(
            ids, attention_observer=lambda _, probs: layers.append(word_attention(probs, owner, sentence.num_words)[0])
        )
    return torch.stack(layers).cpu()


def edge_probabilities(model: MaskedLM, tokenizer: PreTrainedTokenizerBase, sentence: Sentence) -> list[dict[str, Any]]:
    """The attention probabilities along the edges of a parsed sentence, which the terms of the objective read.

    Returns:
        A row for each edge, layer and attention head: `word` (the dependent's place, from 0), `dependent`, `head`,
        `deprel`, `layer`, `attention_head`, and `to_head` (what the dependent's first piece gives to the head's) and
        `to_dependent` (the other way round), before dropout.

    Raises:
        InputError: the sentence is longer than the model can take.
    """
    tokenized = _tokenize(model, tokenizer, sentence)
    heads = heads_of_pieces(sentence, tokenized)
    with evaluating(model) as device:
        ids, edges = (torch.from_numpy(array)[None].to(device) for array in (tokenized.ids, heads))
        output = model(ids, heads=edges)
    to_head, to_dependent = (torch.cat(x).cpu() for x in (output.to_head, output.to_dependent))  # (L, H, S)
    return [
        {
            "word": word,
            "dependent": sentence.words[word],
            "head": sentence.words[sentence.heads[word]],
            "deprel": sentence.deprels[word],
            "layer": layer,
            "attention_head": head,
            "to_head": float(to_head[layer, head, piece]),
            "to_dependent": float(to_dependent[layer, head, piece]),
        }
        for piece in np.flatnonzero(heads >= 0).tolist()
        for word in [int(tokenized.words[piece])]
        for layer in range(to_head.shape[0])
        for head in range(to_head.shape[1])
    ]


def _tokenize(model: MaskedLM, tokenizer: PreTrainedTokenizerBase, sentence: Sentence) -> TokenizedSentence:
    tokenized, longest = tokenize_words([sentence], tokenizer)[0], model.config.max_position_embeddings
    if len(tokenized.ids) > longest:
        raise InputError(f"sentence: has {len(tokenized.ids)} pieces, the model takes {longest}; give a shorter one")
    return tokenized
