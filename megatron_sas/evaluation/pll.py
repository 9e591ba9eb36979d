"""Pseudo-log-likelihoods of sentences under a masked LM (Salazar et al. 2020; Kauf & Ivanova 2023).

A sentence scores the sum over its tokens of log p(token | the others), one masked copy of the sentence per token;
[CLS] and [SEP] stay visible and are not scored. The variant `within_word_l2r` also masks the later pieces of the
token's own word.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megatron_sas.core.cli import InputError
from megatron_sas.core.distributed import all_reduce_sum_
from megatron_sas.data.tokenizer import encode_texts, knows_words
from megatron_sas.data.unknown import Unknown
from megatron_sas.evaluation.batching import AfterBatch, evaluating, shard_batches
from megatron_sas.evaluation.blimp_labels import METRICS

if TYPE_CHECKING:
    from tokenizers import Encoding


@dataclass(frozen=True)
class _Group:
    """All sentences of one length, n tokens without [CLS] and [SEP].

    Copy number c masks token c % n of sentence c // n. Copies are made batch by batch: stored, BLiMP's 1.3 million
    would take 70 MB on every rank. Merging equal copies of a good and a bad sentence would save 3.7 % of BLiMP's: not
    worth its code.
    """

    ids: np.ndarray  # int64 (G, n + 2), with [CLS] and [SEP]
    words: np.ndarray | None  # int64 (G, n), word of each token, when the rest of a word is masked too
    members: np.ndarray  # int64 (G,), indices of the sentences

    @property
    def num_copies(self) -> int:
        return self.ids[:, 1:-1].size

    def copies(self, start: int, stop: int, mask_token_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Copies start..stop-1: ids int64 (copies, n + 2), positions to predict and true tokens, int64 (copies,)."""
        n = self.ids.shape[1] - 2
        sentence, token = np.divmod(np.arange(start, stop), n)
        ids = self.ids[sentence]
        targets = ids[np.arange(len(ids)), token + 1]
        masked = np.arange(n) == token[:, None]
        if self.words is not None:
            words = self.words[sentence]
            masked |= (words == words[np.arange(len(words)), token][:, None]) & (np.arange(n) > token[:, None])
        ids[:, 1:-1][masked] = mask_token_id
        return ids, token + 1, targets


class PllTask:
    """The masked copies of a fixed list of sentences, made once and scored as often as needed.

    `tokenizer` is a fast Hugging Face tokenizer with [CLS], [SEP] and [MASK]. `num_copies` is the number of masked
    copies, `first_equal` int64 (num_sentences,) the first sentence that has the same tokens, `unknown` how much of the
    sentences the tokenizer does not know.

    Raises `InputError` for an unknown metric or one that needs words where the tokenizer knows none, and for a sentence
    without tokens or of more than `max_length` tokens with [CLS] and [SEP] (`names[i]` says where sentence i comes
    from): dropping one would silently change what is measured.
    """

    def __init__(
        self,
        sentences: Sequence[str],
        tokenizer: Any,
        metric: str = "pll",
        max_length: int | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        if metric not in METRICS:
            raise InputError(f"metric {metric!r}: unknown; use one of {', '.join(METRICS)}")
        if metric == "within_word_l2r" and not knows_words(tokenizer):
            raise InputError(f"metric {metric!r}: this tokenizer takes a whole text for one word; use {METRICS[0]}")
        self.metric, self.num_sentences = metric, len(sentences)
        encodings = encode_texts(sentences, tokenizer)
        by_length: dict[int, list[int]] = {}
        first_equal: dict[tuple, int] = {}
        self.first_equal = np.zeros(len(sentences), np.int64)
        for index, sentence in enumerate(sentences):
            length = len(encodings[index]) + 2
            if length == 2 or (max_length is not None and length > max_length):
                where = names[index] if names is not None else f"sentence {index}"
                what = (
                    "has no tokens" if length == 2 else f"has {length} tokens, but the model takes at most {max_length}"
                )
                raise InputError(f"{where}: {sentence[:60]!r} {what}; remove it")
            by_length.setdefault(length, []).append(index)
            words = encodings[index].word_ids if metric == "within_word_l2r" else ()
            self.first_equal[index] = first_equal.setdefault((*encodings[index].ids, *words), index)
        self._mask_token_id: int = tokenizer.mask_token_id
        # Sentences of one length at a time: batches need no padding.
        self._groups = [_group(by_length[length], encodings, tokenizer, metric) for length in sorted(by_length)]
        self.num_copies = sum(group.num_copies for group in self._groups)
        pieces = (Unknown.of(group.ids[:, 1:-1], tokenizer.unk_token_id) for group in self._groups)
        self.unknown = sum(pieces, Unknown())

    def batches(self, batch_tokens: int) -> list[tuple[int, int, int]]:
        """(group, first copy, last copy + 1), each of at most `batch_tokens` tokens and at least one copy."""
        batches = []
        for number, group in enumerate(self._groups):
            size = max(1, batch_tokens // group.ids.shape[1])
            batches += [
                (number, start, min(start + size, group.num_copies)) for start in range(0, group.num_copies, size)
            ]
        return batches

    def num_forwards(self, batch_tokens: int) -> int:
        """Forward passes that `score` makes on every rank."""
        return len(shard_batches(self.batches(batch_tokens)))

    def score(
        self, model: torch.nn.Module, *, batch_tokens: int = 8192, after_batch: AfterBatch | None = None
    ) -> np.ndarray:
        """Pseudo-log-likelihood of every sentence, float64 (num_sentences,), the same on every rank.

        `model` is called as `model(input_ids, masked_positions=...)` and computes logits only there. Log-probabilities
        are float32, their sums float64 in a fixed order, so neither ranks nor the order of batches change a sum. Equal
        sentences, which may be in batches of different sizes, have the score of the first.
        """
        if not self._groups:
            return np.zeros(0)
        log_probs = (
            all_reduce_sum_(self.log_probs(model, shard_batches(self.batches(batch_tokens)), after_batch)).cpu().numpy()
        )
        sentences = np.concatenate([np.repeat(g.members, g.num_copies // len(g.members)) for g in self._groups])
        scores = np.bincount(sentences, weights=log_probs.astype(np.float64), minlength=self.num_sentences)
        return scores[self.first_equal]

    def log_probs(
        self,
        model: torch.nn.Module,
        batches: Sequence[tuple[tuple[int, int, int], bool]],
        after_batch: AfterBatch | None = None,
    ) -> torch.Tensor:
        """Log-probability of each copy's token, group by group, float32 (num_copies,); 0 for those not in `batches`."""
        offsets = np.cumsum([0] + [group.num_copies for group in self._groups])
        with evaluating(model) as device:
            result = torch.zeros(self.num_copies, dtype=torch.float32, device=device)
            for (number, start, stop), counts in batches:
                copies = self._groups[number].copies(start, stop, self._mask_token_id)
                ids, positions, targets = (torch.from_numpy(array).to(device) for array in copies)
                flat = torch.arange(len(ids), device=device) * ids.shape[1] + positions
                logits = model(ids, masked_positions=flat).logits.float()  # (copies, V)
                if counts:
                    log_probs = logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(dim=-1)
                    result[offsets[number] + start : offsets[number] + stop] = log_probs
                if after_batch is not None:
                    after_batch()
        return result


def _group(members: list[int], encodings: Sequence[Encoding], tokenizer: Any, metric: str) -> _Group:
    """The group of the sentences `members`, which have equally many tokens."""
    tokens = np.array([encodings[index].ids for index in members], np.int64)
    ids = np.pad(tokens, ((0, 0), (1, 1)))
    ids[:, 0], ids[:, -1] = tokenizer.cls_token_id, tokenizer.sep_token_id
    words = np.array([encodings[index].word_ids for index in members]) if metric == "within_word_l2r" else None
    return _Group(ids, words, np.array(members))
