"""Pseudo-log-likelihoods of sentences under a masked LM (Salazar et al. 2020; Kauf & Ivanova 2023).

A sentence scores the sum over its tokens of log p(token | the others), one masked copy of the sentence per token;
[CLS] and [SEP] stay visible and are not scored. The variant `within_word_l2r` also masks the later tokens of the
token's word.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from megatron_sas.core.cli import InputError
from megatron_sas.core.distributed import all_reduce_sum_
from megatron_sas.data.tokenizer import encode_texts, knows_words
from megatron_sas.data.unknown import Unknown
from megatron_sas.evaluation.batching import Encoder, evaluating, shard_batches
from megatron_sas.evaluation.blimp_labels import METRICS


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
        by_word = metric == "within_word_l2r"
        if by_word and not knows_words(tokenizer):
            raise InputError(f"metric {metric!r}: this tokenizer takes a whole text for one word; use {METRICS[0]}")
        self._mask_token_id: int = tokenizer.mask_token_id
        encodings = encode_texts(sentences, tokenizer)
        cls_id, sep_id = tokenizer.cls_token_id, tokenizer.sep_token_id
        tokens, words, firsts = [], [], {}
        self.first_equal = np.zeros(len(sentences), np.int64)
        for index, encoding in enumerate(encodings):
            length = len(encoding) + 2
            fault = "has no tokens" if length == 2 else ""
            if max_length is not None and length > max_length:
                fault = f"has {length} tokens, but the model takes at most {max_length}"
            if fault:
                where = f"sentence {index}" if names is None else names[index]
                raise InputError(f"{where}: {sentences[index][:60]!r} {fault}; remove it")
            tokens.append([cls_id, *encoding.ids, sep_id])
            words.append([-1, *(encoding.word_ids if by_word else range(len(encoding))), -1])
            self.first_equal[index] = firsts.setdefault((*tokens[-1], *words[-1]), index)
        self._lengths = np.array([len(row) for row in tokens], np.int64)  # (sentences,), with [CLS] and [SEP]
        self._first_tokens = np.cumsum(self._lengths) - self._lengths  # (sentences,), places in the next two
        self._tokens = np.fromiter(itertools.chain(*tokens), np.int64)  # (tokens,)
        self._words = np.fromiter(itertools.chain(*words), np.int64)  # (tokens,), word of each in its sentence
        order = np.argsort(self._lengths, kind="stable")  # sentences of one length at a time: batches need no padding
        sentences = np.repeat(order, self._lengths[order] - 2)  # (copies,), of which each is
        positions = itertools.chain(*(range(1, length - 1) for length in self._lengths[order]))
        masked = np.fromiter(positions, np.int64, len(sentences))  # (copies,), the token that each predicts
        order, self._starts = self._merge(sentences, masked)
        self._sentences, self._masked, self.num_copies = sentences[order], masked[order], len(order)
        self.unknown = Unknown.of(self._tokens[self._words >= 0], tokenizer.unk_token_id)

    def _merge(self, sentences: np.ndarray, masked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """An order of the copies (copies,) in which those that a model cannot tell apart follow one another, as where
        a good and a bad sentence differ in the masked token alone, and where each group of them starts and the last
        ends, (groups + 1,). Groups are in the order of their first copies."""
        first = np.arange(len(sentences))  # the first copy that each is equal to
        lengths = self._lengths[sentences]
        for length in np.unique(lengths).tolist():
            start, end = np.searchsorted(lengths, [length, length + 1]).tolist()
            own = self._tokens[self._first_tokens[sentences[start:end]][:, None] + np.arange(length)]
            ids = np.where(self._is_masked(sentences[start:end], masked[start:end]), self._mask_token_id, own)
            keys = np.column_stack([ids, masked[start:end]]).astype(np.int32)
            keys = keys.view(np.dtype((np.void, keys.itemsize * keys.shape[1])))[:, 0]
            _, index, inverse = np.unique(keys, return_index=True, return_inverse=True)
            first[start:end] = start + index[inverse]
        order = np.argsort(first, kind="stable")
        starts = np.flatnonzero(np.diff(first[order], prepend=-1))
        return order, np.append(starts, len(order))

    def _is_masked(self, sentences: np.ndarray, masked: np.ndarray) -> np.ndarray:
        """What is masked in copies of sentences of one length, bool (copies, n).

        The token itself is, and what follows it in its word, which is the token alone unless the metric knows words.
        Made when they are needed: stored, BLiMP's 1.3 million would take 140 MB on every rank.
        """
        columns, rows = np.arange(self._lengths[sentences[0]]), np.arange(len(sentences))
        words = self._words[self._first_tokens[sentences][:, None] + columns]
        return (words == words[rows, masked][:, None]) & (columns >= masked[:, None])

    def batches(self, batch_tokens: int) -> list[tuple[int, int]]:
        """(first group, last group + 1), each of one length and of at most `batch_tokens` tokens or one copy.

        A group of copies that are equal to a model counts and is computed once.
        """
        batches, lengths = [], self._lengths[self._sentences[self._starts[:-1]]]
        for length in np.unique(lengths).tolist():
            first, end = np.searchsorted(lengths, [length, length + 1]).tolist()
            size = max(1, batch_tokens // length)
            batches += [(start, min(start + size, end)) for start in range(first, end, size)]
        return batches

    def copies(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A batch of groups: `rows` int64 (R, n), their `copies` int64 (groups, n), flat indices into the rows, and
        the position that each predicts, int64 (groups,).

        The rows are the sentences and, last, masks everywhere: what copies of a sentence have in common is there once.
        """
        firsts = self._starts[start:stop]
        sentences, positions = self._sentences[firsts], self._masked[firsts]
        is_masked = self._is_masked(sentences, positions)
        own, row = np.unique(sentences, return_inverse=True)
        columns = np.arange(is_masked.shape[1])
        rows = self._tokens[self._first_tokens[own][:, None] + columns]
        rows = np.concatenate([rows, np.full_like(rows[:1], self._mask_token_id)])
        return rows, np.where(is_masked, len(own), row[:, None]) * len(columns) + columns, positions

    def num_forwards(self, batch_tokens: int) -> int:
        """Forward passes that `score` makes on every rank."""
        return len(shard_batches(self.batches(batch_tokens)))

    def score(self, model: Encoder, *, batch_tokens: int = 8192) -> np.ndarray:
        """Pseudo-log-likelihood of every sentence, float64 (num_sentences,), the same on every rank.

        Log-probabilities are float32, their sums float64 in a fixed order, so neither ranks nor the order of batches
        change a sum. Equal sentences share their copies, and so their scores.
        """
        if not self.num_copies:
            return np.zeros(0)
        log_probs = all_reduce_sum_(self.log_probs(model, shard_batches(self.batches(batch_tokens)))).cpu().numpy()
        return np.bincount(self._sentences, log_probs.astype(np.float64), len(self.first_equal))

    def log_probs(self, model: Encoder, batches: Sequence[tuple[tuple[int, int], bool]]) -> torch.Tensor:
        """Log-probability of each copy's token, float32 (num_copies,); 0 for those not in `batches`."""
        targets = self._tokens[self._first_tokens[self._sentences] + self._masked]  # (copies,)
        with evaluating(model) as device:
            result = torch.zeros(self.num_copies, dtype=torch.float32, device=device)
            for (start, stop), counts in batches:
                rows, copies, positions = (torch.from_numpy(array).to(device) for array in self.copies(start, stop))
                flat = torch.arange(len(copies), device=device) * rows.shape[1] + positions
                if model.takes_copies:
                    logits = model(rows, copies=copies, masked_positions=flat).logits  # (groups, V)
                else:
                    logits = model(rows.take(copies), masked_positions=flat).logits
                if counts:
                    first, end = self._starts[start], self._starts[stop]
                    group = np.repeat(np.arange(stop - start), np.diff(self._starts[start : stop + 1]))
                    sizes = torch.cat([part.float().logsumexp(dim=1) for part in logits.split(_rows_at_a_time(logits))])
                    own = torch.from_numpy(targets[first:end]).to(device)
                    group = torch.from_numpy(group).to(device)
                    result[first:end] = logits[group, own].float() - sizes[group]
        return result


def _rows_at_a_time(logits: torch.Tensor) -> int:
    """So few that a sum of exponentials stays in a cache of the CPU; on other devices few calls matter more."""
    return max(1, (2**16 if logits.device.type == "cpu" else 2**26) // logits.shape[1])
