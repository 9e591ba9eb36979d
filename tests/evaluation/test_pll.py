"""Masked copies: those that are equal are scored once, and what they share of the first layer is computed once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from bert_pairs import SMALL, SMALL_MODERN, perturbed_bert, random_ids

from megatron_sas.evaluation.pll import METRICS, PllTask

SENTENCES = [
    "The cats that the dog's owner sees annoy Kristin.",
    "The cats that the dog's owner sees annoys Kristin.",  # of as many tokens: one copy of each is the same
    "unbelievableness isn't antidisestablishmentarianism.",
    "unbelievableness wasn't antidisestablishmentarianism.",
    "Dogs bark.",
    "Cats bark.",
    "Dogs bark.",
    "dog",
]


def masked_copies(tokenizer, sentence, metric):
    """(ids of a copy, position that it predicts, the token there), one at a time."""
    encoded = tokenizer(sentence)
    ids, words = encoded["input_ids"], encoded.word_ids()
    for position in range(1, len(ids) - 1):
        later = metric == "within_word_l2r"
        masked = [p == position or (later and p > position and words[p] == words[position]) for p in range(len(ids))]
        yield tuple(np.where(masked, tokenizer.mask_token_id, ids).tolist()), position, ids[position]


@pytest.mark.parametrize("config", [SMALL, SMALL_MODERN, replace(SMALL, num_layers=1)], ids=lambda c: c.architecture)
def test_copies_of_rows_equal_the_rows_written_out(config):
    model = perturbed_bert(config).double().eval()
    rows = random_ids(config, 3, 9)
    source = torch.randint(0, 3, (7, 9), generator=torch.Generator().manual_seed(0))
    copies, seqlens = source * 9 + torch.arange(9), torch.tensor([9, 8, 1, 9, 5, 2, 9])
    with torch.no_grad():
        for options in ({}, {"seqlens": seqlens}, {"only_at": torch.tensor([3, 40, 3])}):
            shared = model(rows, copies=copies, **options).hidden
            torch.testing.assert_close(shared, model(rows.take(copies), **options).hidden, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("config", [SMALL, SMALL_MODERN], ids=lambda c: c.architecture)
@pytest.mark.parametrize("batch_tokens", [1, 40, 8192])
def test_scores_equal_one_whole_forward_per_token_in_float64(config, metric, batch_tokens, tokenizer):
    model = perturbed_bert(replace(config, vocab_size=len(tokenizer))).double().eval()
    expected = np.zeros(len(SENTENCES))
    with torch.no_grad():
        for index, sentence in enumerate(SENTENCES):
            for ids, position, token in masked_copies(tokenizer, sentence, metric):
                hidden = model(torch.tensor([ids])).hidden[0, position]
                expected[index] += model.logits(hidden[None]).log_softmax(-1)[0, token].item()
    found = PllTask(SENTENCES, tokenizer, metric).score(model, batch_tokens=batch_tokens)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("metric", METRICS)
def test_copies_that_are_equal_are_computed_once(metric, tokenizer):
    task = PllTask(SENTENCES, tokenizer, metric)
    copies = [copy for sentence in SENTENCES for copy in masked_copies(tokenizer, sentence, metric)]
    distinct = {(ids, position) for ids, position, _ in copies}
    assert task.num_copies == len(copies) > len(distinct) + 3
    computed = []
    for first, end in task.batches(40):
        rows, places, positions = task.copies(first, end)
        computed += [
            (tuple(ids), position) for ids, position in zip(rows.take(places).tolist(), positions, strict=True)
        ]
    assert len(computed) == len(set(computed)) and set(computed) == distinct


def test_rows_are_sentences_and_one_row_of_masks(tokenizer):
    task = PllTask(SENTENCES, tokenizer)
    for first, end in task.batches(8192):
        rows, places, _ = task.copies(first, end)
        assert (rows[-1] == tokenizer.mask_token_id).all() and len(np.unique(rows, axis=0)) == len(rows)
        assert (places % rows.shape[1] == np.arange(rows.shape[1])).all()
