"""What a model's attention does in one sentence: between tokens, between words, and along the edges of a tree.

L layers, H attention heads, S tokens with [CLS] and [SEP], W words. Each word is cut into tokens by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from megatron_sas.core.cli import InputError
from megatron_sas.evaluation.batching import Encoder, evaluating
from megatron_sas.evaluation.treebank import Sentence, TokenizedSentence, tokenize_words
from megatron_sas.evaluation.uas import dep_heads_of_tokens, word_attention
from megatron_sas.model.base import MaskedLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def attention_maps(
    model: Encoder, tokenizer: PreTrainedTokenizerBase, words: Sequence[str]
) -> tuple[list[str], Tensor]:
    """The tokens of a sentence, and the attention between them: `[l, h, i, j]` is what token i gives to token j.

    Returns:
        S tokens, and float32 `(L, H, S, S)` on the CPU, before dropout; rows sum to 1.

    Raises:
        InputError: the sentence is longer than the model can take.
    """
    tokenized = _tokenize(model, tokenizer, Sentence(words, [-1] * len(words), [""] * len(words)))
    maps = _of_maps(model, tokenized, lambda probs: probs)
    return tokenizer.convert_ids_to_tokens(tokenized.ids.tolist()), maps


def word_maps(model: Encoder, sentence: TokenizedSentence) -> Tensor:
    """Attention between the words of a sentence, float32 `(L, H, W, W)` on the CPU; see `word_attention`."""
    words = sentence.num_words
    owner = torch.from_numpy(np.where(sentence.words < 0, words, sentence.words))[None]
    return _of_maps(model, sentence, lambda probs: word_attention(probs, owner.to(probs.device), words))


def _of_maps(model: Encoder, sentence: TokenizedSentence, read: Callable[[Tensor], Tensor]) -> Tensor:
    """What `read` makes of the map `(1, H, S, S)` of each layer, as one `(L, …)` on the CPU."""
    layers: list[Tensor] = []
    with evaluating(model) as device:
        ids = torch.from_numpy(sentence.ids)[None].to(device)  # (1, S)
        model(ids, attention_observer=lambda _, probs: layers.append(read(probs)[0]))
    return torch.stack(layers).cpu()


def edge_probabilities(model: MaskedLM, tokenizer: PreTrainedTokenizerBase, sentence: Sentence) -> list[dict[str, Any]]:
    """The attention probabilities along the edges of a parsed sentence, which the terms of the objective read.

    Returns:
        A row for each edge, layer and attention head: `word` (the dependent's place, from 0), `dependent`, `head`,
        `deprel`, `layer`, `attention_head`, and `to_head` (what the dependent's first token gives to the head's) and
        `to_dependent` (the other way round), before dropout.

    Raises:
        InputError: the sentence is longer than the model can take.
    """
    tokenized = _tokenize(model, tokenizer, sentence)
    dep_heads = dep_heads_of_tokens(sentence, tokenized)
    with evaluating(model) as device:
        ids, edges = (torch.from_numpy(array)[None].to(device) for array in (tokenized.ids, dep_heads))
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
            "to_head": float(to_head[layer, head, token]),
            "to_dependent": float(to_dependent[layer, head, token]),
        }
        for token in np.flatnonzero(dep_heads >= 0).tolist()
        for word in [int(tokenized.words[token])]
        for layer in range(to_head.shape[0])
        for head in range(to_head.shape[1])
    ]


def _tokenize(model: MaskedLM, tokenizer: PreTrainedTokenizerBase, sentence: Sentence) -> TokenizedSentence:
    tokenized, longest = tokenize_words([sentence], tokenizer)[0], model.config.max_position_embeddings
    if len(tokenized.ids) > longest:
        raise InputError(f"sentence: has {len(tokenized.ids)} pieces, the model takes {longest}; give a shorter one")
    return tokenized
