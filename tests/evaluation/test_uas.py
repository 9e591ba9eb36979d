"""UAS against a naive computation from Hugging Face's eager maps, and against attention with known answers."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from megatron_sas.core.cli import InputError
from megatron_sas.evaluation.batching import after_each_forward, shard_batches
from megatron_sas.evaluation.treebank import Sentence, load_treebank
from megatron_sas.evaluation.uas import DIRECTIONS, OFFSETS, TreebankTask, UasObserver, word_attention


@pytest.fixture(scope="module")
def ewt(data_dir):
    return load_treebank(data_dir / "ud_ewt" / "en_ewt-ud-test.conllu")


def naive_word_attention(probs, word_of_piece, num_words):
    """Nested lists [attending word][word attended to]: mean over a word's rows of sums over a word's columns."""
    pieces = [[p for p, w in enumerate(word_of_piece) if w == word] for word in range(num_words)]
    return [
        [sum(sum(probs[i][j] for j in pieces[b]) for i in pieces[a]) / max(1, len(pieces[a])) for b in range(num_words)]
        for a in range(num_words)
    ]


def naive_counts(hf_model, tokenizer, sentences, max_length):
    """Counters of (relation, direction, layer, head) -> correct and relation -> edges; near ties; skipped sentences."""
    correct, edges, near_ties, skipped = Counter(), Counter(), 0, 0
    for sentence in sentences:
        tokens, owner = ["[CLS]"], [-1]
        for index, word in enumerate(sentence.words):
            pieces = tokenizer.tokenize(word) or ["[UNK]"]
            tokens += pieces
            owner += [index] * len(pieces)
        ids = tokenizer.convert_tokens_to_ids([*tokens, "[SEP]"])
        if len(ids) > max_length:
            skipped += 1
            continue
        with torch.no_grad():
            maps = hf_model.eval().bert(torch.tensor([ids]), output_attentions=True).attentions
        scored = []
        for i, (head, reln) in enumerate(zip(sentence.heads, sentence.deprels, strict=True)):
            name = reln.split(":")[0]
            if head >= 0 and name.lower() not in ("root", "punct"):
                scored.append((i, head, name))
                edges[name] += 1
        for layer, layer_maps in enumerate(maps):
            for head, probs in enumerate(layer_maps[0].tolist()):
                words = naive_word_attention(probs, [*owner, -1], len(sentence.words))
                for i, gold, name in scored:
                    others = [j for j in range(len(words)) if j != i]
                    received = [row[i] for row in words]
                    for direction, values in zip(DIRECTIONS, (words[i], received), strict=True):
                        best = max(values[j] for j in others)
                        first = next(j for j in others if values[j] == best)
                        correct[name, direction, layer, head] += first == gold
                        near_ties += any(values[j] > best * (1 - 1e-5) for j in others if j != first)
    return correct, edges, near_ties, skipped


def as_counter(task, counts):
    return Counter(
        {
            (relation, direction, layer, head): int(counts[r, d, layer, head])
            for r, relation in enumerate(task.relations)
            for d, direction in enumerate(DIRECTIONS)
            for layer in range(counts.shape[2])
            for head in range(counts.shape[3])
        }
    )


def test_counts_equal_a_naive_computation_from_eager_maps(adapter, hf_model, tokenizer, ewt):
    sentences, max_length = ewt[:80], 40
    task = TreebankTask(sentences, tokenizer, max_length)
    result = task.evaluate(adapter, batch_tokens=500)
    correct, edges, near_ties, skipped = naive_counts(hf_model, tokenizer, sentences, max_length)
    ours = as_counter(task, np.array(result["counts"]["correct"]))

    assert skipped > 0, "the sample should hold a sentence that does not fit"
    assert (result["num_skipped"], result["num_sentences"]) == (skipped, len(sentences) - skipped)
    assert {name: row["count"] for name, row in result["relations"].items()} == edges
    # Rounding inside the model depends on the shape of the batch, so only a near tie may be decided differently.
    assert sum(abs(ours[key] - correct[key]) for key in ours) <= near_ties
    assert near_ties < 10

    best = {name: max(n for key, n in ours.items() if key[0] == name) for name in edges}
    assert result["uas"] == pytest.approx(sum(best.values()) / sum(edges.values()), abs=1e-12)
    totals = Counter()
    for (_, *place), hits in ours.items():
        totals[tuple(place)] += hits
    assert result["uas_single_head"] == pytest.approx(max(totals.values()) / sum(edges.values()), abs=1e-12)
    for name, row in result["relations"].items():
        assert row["accuracy"] == best[name] / edges[name]
        assert ours[name, row["direction"], row["layer"], row["head"]] == best[name]
        assert row["in_table"] == (edges[name] >= 100)
    place = result["single_head"]
    assert totals[place["direction"], place["layer"], place["head"]] == max(totals.values())


def test_our_model_gives_the_counts_of_hugging_face(adapter, model_directory, tokenizer, ewt):
    from megatron_sas.run.reading import load_model

    model, _ = load_model(model_directory)
    task = TreebankTask(ewt[:200], tokenizer, 160)
    ours, theirs = (np.array(task.evaluate(m)["counts"]["correct"]) for m in (model, adapter))
    assert np.abs(ours - theirs).sum() <= 5  # of some 30,000 predictions: near ties


def count_correct(model, task, batches):
    observer = UasObserver(task)
    task.observe(model, batches, [observer])
    return observer.counts()


def test_neither_batches_nor_ranks_change_the_counts(adapter, tokenizer, ewt):
    task = TreebankTask(ewt[:60], tokenizer, 160)
    whole = count_correct(adapter, task, shard_batches(task.batches(2000), 0, 1))
    for batch_tokens, ranks in ((1, 1), (300, 1), (2000, 3), (10**6, 2)):
        parts = [
            count_correct(adapter, task, shard_batches(task.batches(batch_tokens), r, ranks)) for r in range(ranks)
        ]
        assert np.abs(sum(parts) - whole).sum() <= 5, (batch_tokens, ranks)


def test_forwards_are_as_announced_and_the_model_evaluates_in_evaluation_mode(adapter, tokenizer, ewt):
    task = TreebankTask(ewt[:30], tokenizer, 160)
    calls = []
    adapter.train()
    with after_each_forward(adapter, lambda: calls.append(adapter.training)):
        task.evaluate(adapter, batch_tokens=200)
    assert len(calls) == adapter.forwards == task.num_forwards(200) > 1
    assert not any(calls)
    assert adapter.training


def test_batches_keep_to_the_budget_and_hold_each_sentence_once(tokenizer, ewt):
    task = TreebankTask(ewt[:200], tokenizer, 160)
    batches = task.batches(256)
    assert sorted(np.concatenate(batches).tolist()) == list(range(200))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(len(task.sentences[i].ids) for i in batch) <= 256


def test_baselines_by_brute_force(tokenizer, ewt):
    task = TreebankTask(ewt, tokenizer, 512)
    correct, edges = Counter(), Counter()
    for sentence in ewt:
        for i, (head, reln) in enumerate(zip(sentence.heads, sentence.deprels, strict=True)):
            name = reln.split(":")[0]
            if name in ("root", "punct"):
                continue
            edges[name] += 1
            for offset in OFFSETS:
                inside = 0 <= i + offset < len(sentence.words)
                correct[name, offset] += inside and i + offset == head
    assert dict(zip(task.relations, task.edge_counts.tolist(), strict=True)) == edges
    for name, row in zip(task.relations, task.baseline_counts, strict=True):
        assert row.tolist() == [correct[name, offset] for offset in OFFSETS]


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3), st.integers(1, 3), st.lists(st.integers(1, 3), min_size=1, max_size=5), st.integers(0, 2**31))
def test_word_attention_is_sum_over_columns_and_mean_over_rows(batch, heads, pieces, seed):
    owner = [-1] + [word for word, count in enumerate(pieces) for _ in range(count)] + [-1]
    probs = torch.rand(batch, heads, len(owner), len(owner), generator=torch.Generator().manual_seed(seed))
    words = len(pieces) + 1  # one more than there are: a padded word
    indices = torch.tensor([words if word < 0 else word for word in owner]).expand(batch, -1)
    expected = [[naive_word_attention(p, owner, words) for p in maps] for maps in probs.tolist()]
    with torch.autocast("cpu", torch.bfloat16):  # a training loop may run it so; it must not lose precision
        actual = word_attention(probs, indices, words)
    torch.testing.assert_close(actual.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)


class GivenAttention(nn.Module):
    """A "model" with one layer whose attention map of a sequence is made by a function of its length."""

    def __init__(self, make_maps):
        super().__init__()
        self.anything = nn.Parameter(torch.zeros(1))
        self.make_maps = make_maps

    def forward(self, input_ids, *, seqlens=None, attention_observer=None):
        lengths = [input_ids.shape[1]] * len(input_ids) if seqlens is None else seqlens.tolist()
        maps = [torch.nn.functional.pad(m, (0, input_ids.shape[1] - n) * 2) for m, n in self._maps(lengths)]
        attention_observer(0, torch.stack(maps).float())

    def _maps(self, lengths):
        return [(self.make_maps(n), n) for n in lengths]


SENTENCES = [
    Sentence(
        ["the", "old", "dog", "saw", "a", "cat", "."],
        [2, 2, 3, -1, 5, 3, 3],
        ["det", "amod", "nsubj", "root", "det", "obj", "punct"],
    ),
    Sentence(["dogs", "bark", "loudly"], [1, -1, 1], ["nsubj:outer", "ROOT", "advmod"]),
]
BY_LENGTH = {len(s.words) + 2: s for s in SENTENCES}


def one_hot_rows(targets):
    return torch.nn.functional.one_hot(torch.tensor(targets), len(targets)).double()


def test_attention_along_the_gold_tree_scores_one_and_is_named(tokenizer):
    def maps(length):
        sentence = BY_LENGTH[length]
        to_head = one_hot_rows([0] + [head + 1 if head >= 0 else 0 for head in sentence.heads] + [0])
        distraction = torch.zeros(length, length).double()
        distraction[:, 0] = distraction[:, -1] = 0.3  # [CLS] and [SEP] …
        distraction += 0.3 * torch.eye(length)  # … and the word itself take most, and do not count
        return torch.stack([one_hot_rows([0] * length), distraction + 0.1 * to_head, distraction + 0.1 * to_head.T])

    result = TreebankTask(SENTENCES, tokenizer, 20).evaluate(GivenAttention(maps))
    assert result["uas"] == result["uas_single_head"] == 1.0
    assert result["num_edges"] == 7
    assert set(result["relations"]) == {"det", "amod", "nsubj", "obj", "advmod"}
    assert result["single_head"] == {"layer": 0, "head": 1, "direction": "dep->head"}
    everything = np.array(result["counts"]["correct"]).sum(axis=0)  # (direction, layer, head)
    assert everything[0, 0, 1] == 7  # attending to the head is direction dep->head …
    assert everything[1, 0, 2] == 7  # … and being attended to by the head is direction head->dep
    assert result["relations"]["det"]["baseline"] == 0.5
    assert result["relations"]["det"]["baseline_offset"] == 1


def test_ties_go_to_the_first_other_word(tokenizer):
    result = TreebankTask(SENTENCES, tokenizer, 20).evaluate(GivenAttention(lambda n: torch.full((1, n, n), 1 / n)))
    first = sum(
        head == (0 if i else 1)
        for s in SENTENCES
        for i, (head, reln) in enumerate(zip(s.heads, s.deprels, strict=True))
        if reln.lower() not in ("root", "punct")
    )
    assert np.array(result["counts"]["correct"]).sum(axis=(0, 2, 3)).tolist() == [first, first]


def test_pieces_are_summed_when_attended_to_and_averaged_when_attending(tokenizer):
    words = ["unbelievableness", "dogs", "bark"]
    pieces = len(tokenizer.tokenize(words[0]))
    assert pieces > 1 and len(tokenizer.tokenize(" ".join(words))) == pieces + 2
    dogs, bark = pieces + 1, pieces + 2

    def maps(length):
        attention = torch.zeros(1, length, length)
        attention[0, bark, 1 : 1 + pieces] = 0.4 / pieces  # together more than 0.3
        attention[0, bark, dogs] = 0.3
        attention[0, 1 : 1 + pieces, bark] = 0.4  # their sum exceeds 0.5, their mean does not
        attention[0, dogs, bark] = 0.5
        return attention

    for head, (dep_to_head, head_to_dep) in {0: (1, 0), 1: (0, 1)}.items():
        sentence = Sentence(words, [-1, -1, head], ["root", "root", "dep"])
        counts = TreebankTask([sentence], tokenizer, 20).evaluate(GivenAttention(maps))["counts"]["correct"]
        assert np.array(counts).flatten().tolist() == [dep_to_head, head_to_dep]


def test_nothing_to_score_is_an_error(tokenizer):
    with pytest.raises(InputError, match="no sentence fits the model's maximum of 4"):
        TreebankTask(SENTENCES, tokenizer, 4)
    with pytest.raises(InputError, match="no dependency to score"):
        TreebankTask([Sentence(["Yes", "!"], [-1, 0], ["root", "punct"])], tokenizer, 20)


def test_a_word_without_pieces_becomes_unk(tokenizer):
    task = TreebankTask([Sentence(["a", "\u200b", "dog"], [2, 2, -1], ["det", "dep", "root"])], tokenizer, 20)
    assert tokenizer.tokenize("\u200b") == []
    assert tokenizer.convert_ids_to_tokens(task.sentences[0].ids) == ["[CLS]", "a", "[UNK]", "dog", "[SEP]"]
    assert task.sentences[0].words.tolist() == [-1, 0, 1, 2, -1]
