"""Pseudo-log-likelihoods against a naive loop and against minicons; reading and summarising BLiMP."""

from __future__ import annotations

import copy
import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers

from megatron_sas.core.cli import InputError
from megatron_sas.evaluation.batching import after_each_forward, shard_batches
from megatron_sas.evaluation.blimp_labels import renew_record
from megatron_sas.evaluation.minimal_pairs import BlimpTask, PairSet, load_blimp
from megatron_sas.evaluation.pll import METRICS, PllTask

SENTENCES = [
    "Who should Derek hug after shocking Richard?",
    "unbelievableness isn't antidisestablishmentarianism.",
    "Dogs bark.",
    "dog",
    "The cats that the dog's owner sees annoy Kristin's well-behaved neighbours, don't they?",
    "Dogs barks.",
]


def score_sentences(model, tokenizer, sentences, metric="pll", batch_tokens=8192):
    return PllTask(sentences, tokenizer, metric).score(model, batch_tokens=batch_tokens)


def naive_score(hf_model, tokenizer, sentence, metric):
    """One masked copy at a time, words told apart by the "##" of WordPiece and by the tokenizer's own splitting."""
    encoded = tokenizer(sentence)
    ids, words = encoded["input_ids"], encoded.word_ids()
    total = 0.0
    for position in range(1, len(ids) - 1):
        copy = list(ids)
        copy[position] = tokenizer.mask_token_id
        if metric == "within_word_l2r":
            later = position + 1
            while words[later] == words[position]:
                copy[later] = tokenizer.mask_token_id
                later += 1
        with torch.no_grad():
            logits = hf_model(torch.tensor([copy])).logits[0, position]
        total += torch.log_softmax(logits.double(), dim=-1)[ids[position]].item()
    return total


def test_special_tokens_in_sentences_are_text(adapter, tokenizer):
    for name in ("[MASK]", "[SEP]", "[CLS]", "[PAD]", "[UNK]"):
        apart = f"The [ {name.strip('[]').lower()} ] barks."
        scores = score_sentences(adapter, tokenizer, [f"The {name} barks.", apart])
        assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def test_unknown_pieces_are_counted(adapter, tokenizer):
    pairs = [("Dogs bark ☃ ☃.", "Dogs barks ☃.")]
    result = BlimpTask([PairSet("a", "b", "c", pairs)], tokenizer).evaluate(adapter)
    assert result["unknown"] == {"num_pieces": 10, "num_unknown": 3, "share": 0.3}


@pytest.mark.parametrize("metric", METRICS)
def test_scores_equal_a_naive_loop(adapter, hf_model, tokenizer, metric):
    expected = [naive_score(hf_model, tokenizer, sentence, metric) for sentence in SENTENCES]
    for batch_tokens in (1, 50, 8192):
        scores = score_sentences(adapter, tokenizer, SENTENCES, metric, batch_tokens=batch_tokens)
        assert scores.dtype == np.float64
        np.testing.assert_allclose(scores, expected, atol=1e-4, rtol=0)
    assert len(set(np.round(scores, 1))) == len(SENTENCES), "the model should tell the sentences apart"


def test_the_metrics_differ_only_for_words_of_several_pieces(adapter, tokenizer):
    pll, l2r = (score_sentences(adapter, tokenizer, SENTENCES, metric) for metric in METRICS)
    assert len(tokenizer.tokenize(SENTENCES[2])) == 3
    np.testing.assert_allclose(pll[[2, 3]], l2r[[2, 3]], atol=1e-5)
    assert abs(pll[1] - l2r[1]) > 0.1


@pytest.mark.parametrize(("ours", "theirs"), [("pll", "original"), ("within_word_l2r", "within_word_l2r")])
def test_scores_equal_minicons(adapter, hf_model, tokenizer, data_dir, monkeypatch, ours, theirs):
    scorer = pytest.importorskip("minicons.scorer")
    # minicons 0.3.39 calls a method of tokenizers that transformers 5 removed.
    monkeypatch.setattr(
        type(tokenizer), "batch_encode_plus", lambda self, *args, **kwargs: self(*args, **kwargs), raising=False
    )
    sets = load_blimp(data_dir / "blimp")
    sentences = SENTENCES + [sentence for s in sets[::8] for sentence in s.pairs[0]]
    model = scorer.MaskedLMScorer(hf_model, "cpu", tokenizer=tokenizer)
    expected = model.sequence_score(sentences, reduction=lambda x: x.sum(0).item(), PLL_metric=theirs)
    np.testing.assert_allclose(score_sentences(adapter, tokenizer, sentences, ours), expected, atol=1e-3, rtol=0)


def test_our_model_gives_the_scores_of_hugging_face(adapter, model_directory):
    from megatron_sas.run.reading import load_model

    model, tokenizer = load_model(model_directory)
    ours, theirs = (score_sentences(m, tokenizer, SENTENCES) for m in (model, adapter))
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)


def test_ranks_share_the_work_and_give_the_same_sums(adapter, tokenizer):
    task = PllTask(SENTENCES, tokenizer)
    whole = task.log_probs(adapter, shard_batches(task.batches(60), 0, 1))
    for ranks in (2, 5):
        parts = [task.log_probs(adapter, shard_batches(task.batches(60), rank, ranks)) for rank in range(ranks)]
        torch.testing.assert_close(sum(parts), whole, atol=0, rtol=0)  # same batches: bit for bit


def test_forwards_are_as_announced_and_keep_to_the_budget(adapter, tokenizer):
    task, calls = PllTask(SENTENCES, tokenizer), []
    with after_each_forward(adapter, lambda: calls.append(1)):
        task.score(adapter, batch_tokens=60)
    assert len(calls) == adapter.forwards == task.num_forwards(60)
    for start, stop in task.batches(60):
        _, copies, _ = task.copies(start, stop)
        assert len(copies) == 1 or copies.size <= 60


def test_real_blimp(adapter, tokenizer, data_dir):
    data = load_blimp(data_dir / "blimp")
    assert len(data) == 67
    assert all(len(s.pairs) == 1000 for s in data)
    result = BlimpTask(data, tokenizer, pairs_per_set=3, max_length=160).evaluate(adapter)
    assert (result["num_sets"], result["num_pairs"], result["num_sentences"]) == (67, 201, 402)
    scores = score_sentences(adapter, tokenizer, [x for s in data for pair in s.pairs[:3] for x in pair])
    correct = {
        s.uid: sum(scores[6 * i : 6 * i + 6 : 2] > scores[6 * i + 1 : 6 * i + 6 : 2]) for i, s in enumerate(data)
    }
    assert {uid: row["correct"] for uid, row in result["sets"].items()} == correct
    assert result["blimp"] == pytest.approx(sum(correct.values()) / 201)
    assert set(result["fields"]) == {s.field for s in data}
    assert len(result["terms"]) == len({s.term for s in data}) >= 12
    assert result["num_non_finite"] == 0


def test_blimp_has_four_fields_and_twelve_terms_each_over_all_its_sets(adapter, tokenizer, data_dir):
    data = load_blimp(data_dir / "blimp")
    assert Counter(s.field for s in data) == {"syntax": 26, "morphology": 18, "syntax_semantics": 14, "semantics": 9}
    lines = (data_dir / "blimp" / "reference" / "models_summary.jsonl").read_text().splitlines()
    published = {row["UID"]: row["linguistics_term"] for row in map(json.loads, lines) if row["UID"] != "overall"}
    assert {s.uid: s.term for s in data} == published and len(set(published.values())) == 12
    result = BlimpTask(data, tokenizer, pairs_per_set=2).evaluate(adapter)
    for kind, index in (("field", "fields"), ("linguistics_term", "terms")):
        rows = result["sets"].values()
        labels = {row[kind] for row in rows}
        assert result[index] == {
            name: pytest.approx(np.mean([row["accuracy"] for row in rows if row[kind] == name])) for name in labels
        }
    assert len(result["fields"]) == 4
    assert result["sets"]["principle_A_case_2"]["field"] == "syntax_semantics"


def test_old_lines_of_all_of_blimp_are_merged_and_others_left_out():
    sets = {str(number): {"accuracy": 0.5, "num_pairs": 9} for number in range(67)}
    fields = {"syntax": 0.7, "syntax/semantics": 0.9, "syntax_semantics": 0.6}
    line = {"blimp": 0.5, "blimp_fields": fields, "blimp_terms": {"binding": 0.5}, "blimp_sets": sets}
    renewed = renew_record(line)
    assert renewed["blimp_fields"] == {"syntax": 0.7, "syntax_semantics": pytest.approx((0.9 + 13 * 0.6) / 14)}
    assert renewed == {**line, "blimp_fields": renewed["blimp_fields"]}
    del sets["0"]
    assert renew_record(line)["blimp_fields"] == {"syntax": 0.7}
    assert renew_record(line)["blimp_unmerged"] == ["syntax_semantics"]
    assert renew_record({"blimp_fields": {"syntax/semantics": 0.9}}) == {"blimp_fields": {"syntax_semantics": 0.9}}


class NoPreference(torch.nn.Module):
    """Scores a token the same wherever it is, but for the last digits, which depend on the batch."""

    takes_copies = False

    def __init__(self, vocab_size):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.randn(vocab_size, generator=torch.Generator().manual_seed(0)))

    def forward(self, ids, *, masked_positions):
        noise = 1 + 2e-7 * torch.randn(len(ids), 1, generator=torch.Generator().manual_seed(len(ids)))
        return SimpleNamespace(logits=self.bias.expand(len(masked_positions), -1) * noise)


def test_a_model_without_a_preference_ties_whichever_sentence_comes_first_and_in_any_batches(tokenizer, data_dir):
    pairs = [
        *[("the dog saw the cat .", "the cat saw the dog .")] * 40,
        *[("a dog barks .", "a dog barks .")] * 3,
        *[("A dog barks .", "a dog barks .")] * 2,  # the same to this tokenizer
        *[("a dog barks .", "a dog barks loudly .")] * 5,
    ]
    model = NoPreference(len(tokenizer))
    for swapped in (False, True):
        data = [PairSet("u", "f", "t", [pair[::-1] if swapped else pair for pair in pairs])]
        for batch_tokens in (7, 100, 8192):
            result = BlimpTask(data, tokenizer).evaluate(model, batch_tokens=batch_tokens)
            row = result["sets"]["u"]
            assert (row["ties"], row["identical"], row["correct"]) == (45, 5, 0 if swapped else 5)
            assert (result["num_ties"], result["num_identical"]) == (45, 5)


def test_equal_sentences_tie_however_large_the_noise(tokenizer):
    class Noisy(NoPreference):
        def forward(self, ids, *, masked_positions):
            return SimpleNamespace(logits=torch.randn(len(masked_positions), len(self.bias)))

    data = [PairSet("u", "f", "t", [("a dog barks .", "a dog barks .")] * 9)]
    for metric in METRICS:
        result = BlimpTask(data, tokenizer, metric).evaluate(Noisy(len(tokenizer)), batch_tokens=20)
        assert (result["blimp"], result["num_ties"], result["num_identical"]) == (0, 9, 9)


def test_real_pairs_of_identical_sentences_are_counted(tokenizer, data_dir):
    data = [s for s in load_blimp(data_dir / "blimp") if s.uid in ("passive_1", "principle_A_case_2", "wh_island")]
    task = BlimpTask(data, tokenizer)
    result = task.summarize(np.zeros(6000), seconds=1.0)
    assert [row["identical"] for row in result["sets"].values()] == [2, 5, 0]
    assert (result["num_ties"], result["blimp"]) == (3000, 0)


def test_summary_counts_strict_wins_and_averages_over_sets(tokenizer):
    pair = ("Dogs bark.", "Dogs barks.")
    data = [
        PairSet("a", "morphology", "agreement", [pair] * 4),
        PairSet("b", "morphology", "anaphors", [pair]),
        PairSet("c", "syntax", "agreement", [pair] * 2),
    ]
    task = BlimpTask(data, tokenizer)
    wins = [1, 0, 1, 1, 0, 1, 1]
    scores = np.array([(-1.0, -2.0) if win else (-3.0, -3.0) for win in wins]).flatten()
    scores[-2] = np.nan  # the last good sentence
    result = task.summarize(scores, seconds=2.0)
    assert {uid: row["accuracy"] for uid, row in result["sets"].items()} == {"a": 0.75, "b": 0.0, "c": 0.5}
    assert result["fields"] == {"morphology": 0.375, "syntax": 0.5}
    assert result["terms"] == {"agreement": 0.625, "anaphors": 0.0}
    assert result["blimp"] == pytest.approx(1.25 / 3)
    assert (result["num_non_finite"], result["sentences_per_second"]) == (1, 7.0)
    assert [row["ties"] for row in result["sets"].values()] == [1, 1, 0]  # a score that is no number ties with nothing


LINE = {"sentence_good": "A dog.", "sentence_bad": "A dogs.", "field": "f", "linguistics_term": "t", "UID": "u"}


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("{]", r"u\.jsonl:2: not JSON"),
        ([1], r"u\.jsonl:2: expected an object, found list"),
        ({**LINE, "sentence_bad": ""}, r"u\.jsonl:2: field 'sentence_bad' is missing or not a non-empty string"),
        ({k: v for k, v in LINE.items() if k != "field"}, r"u\.jsonl:2: field 'field' is missing"),
        ("[" * 100_000, r"u\.jsonl:2: not JSON \(maximum recursion"),
        ({**LINE, "sentence_bad": "A \ud83d."}, r"u\.jsonl:2: half of a surrogate pair in field 'sentence_bad'"),
        ({**LINE, "UID": "v"}, r"u\.jsonl:2: UID, field and linguistics_term are \('v', 'f', 't'\)"),
    ],
)
def test_broken_lines_name_file_line_and_field(tmp_path, second, message):
    second = second if isinstance(second, str) else json.dumps(second)
    (tmp_path / "u.jsonl").write_text(json.dumps(LINE) + "\n" + second + "\n")
    with pytest.raises(InputError, match=message):
        load_blimp(tmp_path)


def test_a_byte_order_mark_is_dropped(tmp_path):
    (tmp_path / "u.jsonl").write_text(json.dumps(LINE) + "\n", "utf-8-sig")
    assert load_blimp(tmp_path)[0].pairs == [("A dog.", "A dogs.")]


def test_unusable_folders(tmp_path):
    with pytest.raises(InputError, match="no such directory"):
        load_blimp(tmp_path / "none")
    with pytest.raises(InputError, match=r"no \.jsonl files"):
        load_blimp(tmp_path)
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(InputError, match=r"a\.jsonl: no pairs"):
        load_blimp(tmp_path)
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(LINE) + "\n")
    with pytest.raises(InputError, match=r"b\.jsonl: UID 'u' is also that of another file"):
        load_blimp(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(b'{"UID": "\xff"}\n')
    with pytest.raises(InputError, match=r"a\.jsonl: not UTF-8 at byte 9"):
        load_blimp(tmp_path)


def test_what_cannot_be_scored_is_an_error(adapter, tokenizer):
    with pytest.raises(InputError, match="metric 'nll': unknown"):
        score_sentences(adapter, tokenizer, SENTENCES, "nll")
    wordless = copy.deepcopy(tokenizer)
    wordless.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    with pytest.raises(InputError, match="metric 'within_word_l2r': this tokenizer takes a whole text for one word"):
        PllTask(SENTENCES, wordless, "within_word_l2r")
    assert PllTask(SENTENCES, wordless).num_copies > 0
    with pytest.raises(InputError, match=r"sentence 1: .* has no tokens"):
        score_sentences(adapter, tokenizer, ["dog", "\u200b"])
    data = [PairSet("some_set", "f", "t", [("Dogs bark.", "Dogs bark loudly at cats."), ("a b", "a c")])]
    with pytest.raises(InputError, match=r"some_set: pair 0: .* has 8 tokens, but the model takes at most 7"):
        BlimpTask(data, tokenizer, max_length=7)
    with pytest.raises(InputError, match="pairs_per_set: 0 is below 1"):
        BlimpTask(data, tokenizer, pairs_per_set=0)
    assert len(score_sentences(adapter, tokenizer, [])) == 0
