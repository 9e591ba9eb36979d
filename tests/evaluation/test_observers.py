"""Entropy, attention to special tokens and SAS, against float64 sums over transformers' maps, in one pass with UAS."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_sas.evaluation.batching import TokenBatch, shard_batches
from megatron_sas.evaluation.observers import AttentionStatistics, SasOfEdges, SasOfMaps, seen_keys, share_pass
from megatron_sas.evaluation.treebank import Sentence, load_treebank
from megatron_sas.evaluation.uas import TreebankTask, UasObserver
from megatron_sas.kernels.reference import in_window
from megatron_sas.model.architectures import build_model
from megatron_sas.model.modernbert import ModernBertConfig
from megatron_sas.objective.along_edges import attention_along
from megatron_sas.run.reading import load_model


@pytest.fixture(scope="module")
def task(data_dir, tokenizer):
    return TreebankTask(load_treebank(data_dir / "ud_ewt" / "en_ewt-ud-test.conllu")[:60], tokenizer, 40)


def naive(hf_model, tokenizer, data_dir):
    """Sums over tokens of entropy and of attention to [CLS] and [SEP] (3, L, H), and of the largest entropy; per edge
    the maximum and the mean over heads in both directions. Sentence by sentence."""
    sums, largest, tokens, maxima, means = 0.0, 0.0, 0, [], []
    for sentence in load_treebank(data_dir / "ud_ewt" / "en_ewt-ud-test.conllu")[:60]:
        pieces, first = ["[CLS]"], []
        for word in sentence.words:
            first.append(len(pieces))
            pieces += tokenizer.tokenize(word) or ["[UNK]"]
        ids = tokenizer.convert_tokens_to_ids([*pieces, "[SEP]"])
        if len(ids) > 40:
            continue
        with torch.no_grad():
            maps = torch.stack(hf_model.bert(torch.tensor([ids]), output_attentions=True).attentions)[:, 0].double()
        entropies = -(maps * maps.clamp(min=1e-300).log()).sum(dim=(2, 3))
        sums = sums + torch.stack([entropies, maps[..., 0].sum(-1), maps[..., -1].sum(-1)])
        largest += len(ids) * np.log(len(ids))
        tokens += len(ids)
        for word, head in enumerate(sentence.heads):
            if head >= 0:
                both = [maps[:, :, first[word], first[head]], maps[:, :, first[head], first[word]]]
                maxima.append([float(values.max()) for values in both])
                means.append([float(values.mean()) for values in both])
    return sums / tokens, largest / tokens, np.mean(maxima, axis=0), np.mean(means, axis=0), len(maxima)


def test_one_pass_gives_entropy_sas_and_uas(adapter, model_directory, hf_model, tokenizer, task, data_dir):
    statistics, sas, uas = task.attention_statistics(), SasOfMaps(), UasObserver(task, keep_edges=True)
    model, _ = load_model(model_directory)
    forwards = []
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    batches = shard_batches(task.batches(500))
    assert sum(task.sentences[i].ids.size for i in batches[0][0]) < 500, "some batch should have padding"
    task.observe(model, batches, [statistics, sas, uas])
    assert len(forwards) == len(batches)

    expected, largest, maxima, means, edges = naive(hf_model, tokenizer, data_dir)
    ratio = float(expected[0].median()) / largest  # half of the heads are below it
    result = statistics.result(threshold=ratio + 1e-4)
    assert result["uniform_entropy"] == pytest.approx(largest, rel=1e-12)
    assert result["collapsed_heads"] == 0.5
    for name, per_head in zip(("entropy", "to_cls", "to_sep"), expected, strict=True):
        assert np.allclose(result[name]["per_head"], per_head, rtol=1e-5)
        assert result[name]["mean"] == pytest.approx(float(per_head.mean()), rel=1e-5)
    along = sas.result()
    assert along["num_edges"] == edges > task.edge_counts.sum()  # punctuation has edges too
    assert [along["to_head"], along["to_dependent"]] == pytest.approx(maxima, rel=1e-5)
    assert [along["uniform_to_head"], along["uniform_to_dependent"]] == pytest.approx(means, rel=1e-5)

    expected = task.evaluate(adapter, batch_tokens=500)["counts"]["correct"]
    assert uas.counts().tolist() == expected
    bits, listed = uas.edges(), task.edge_list()
    assert bits.shape == (len(listed), 2, *np.shape(expected)[2:])
    for number in range(len(task.relations)):
        assert bits[listed[:, 1] == number].sum(axis=0).tolist() == expected[number]


def test_edges_are_listed_by_sentence_of_the_treebank(tokenizer):
    sentences = [
        Sentence(["dog"] * 30, [1] + [0] * 29, ["dep"] * 30),  # too long
        Sentence(["a", "dog", "barks"], [1, 2, -1], ["det", "nsubj", "root"]),
        Sentence(["dogs", "bark", "!"], [1, -1, 1], ["nsubj", "root", "punct"]),
    ]
    task = TreebankTask(sentences, tokenizer, 20)
    assert task.relations == ["det", "nsubj"]
    assert task.edge_list().tolist() == [[1, 0], [1, 1], [2, 1]]
    assert task.dep_heads[1].tolist() == [-1, 2, -1, 2, -1]


def test_sas_is_the_regularizers_own_term(model_directory, task):
    """Read off whole maps here, off the kernel's edge probabilities there."""
    model, _ = load_model(model_directory)
    sas = SasOfMaps()
    task.observe(model, shard_batches(task.batches(500)), [sas])
    result, totals = sas.result(), {}
    for direction in ("to_head", "to_dependent"):
        for mode in ("max", "uniform"):
            total = 0.0
            for ids, heads in zip((s.ids for s in task.sentences), task.dep_heads, strict=True):
                with torch.no_grad():
                    output = model(torch.from_numpy(ids)[None], heads=torch.from_numpy(heads)[None])
                term = attention_along(output.to_head, output.to_dependent, mode=mode, directions=direction)
                total += float(term) / (1 if mode == "max" else 8)  # layers × heads
            totals[direction if mode == "max" else f"uniform_{direction}"] = total / result["num_edges"]
    assert {name: result[name] for name in totals} == pytest.approx(totals, rel=1e-5)


def test_a_rank_without_sentences_adds_nothing(model_directory, task):
    model, _ = load_model(model_directory)
    batches = task.batches(500)
    results = []
    for dealt in (shard_batches(batches), [*shard_batches(batches), (batches[0], False)]):
        statistics, sas, uas = task.attention_statistics(), SasOfMaps(), UasObserver(task)
        task.observe(model, dealt, [statistics, sas, uas])
        results.append((statistics.result(), sas.result(), uas.counts().tolist()))
    assert results[0] == results[1]


def test_without_edges_there_is_no_sas(model_directory):
    model, _ = load_model(model_directory)
    observers = [SasOfMaps(), SasOfEdges()]
    with torch.no_grad():
        share_pass(model, TokenBatch(torch.full((2, 5), 7), torch.full((2, 5), -1)), observers)
    assert [sas.result() for sas in observers] == [None, None]


def test_sas_of_maps_and_of_the_models_output_agree(model_directory, task):
    model, _ = load_model(model_directory)
    maps, output = SasOfMaps(), SasOfEdges()
    task.observe(model, shard_batches(task.batches(500)), [maps])
    for ids, dep_heads in zip((s.ids for s in task.sentences), task.dep_heads, strict=True):
        batch = TokenBatch(torch.from_numpy(ids)[None], torch.from_numpy(dep_heads)[None])
        with torch.no_grad():
            share_pass(model, batch, [output])
    assert output.result() == pytest.approx(maps.result(), rel=1e-5)


@pytest.mark.parametrize("window", [(0, 0), (3, 3), (2, 7), (40, 1)])
def test_keys_that_are_seen_in_a_window_are_counted(window):
    lengths, rows = torch.tensor([11, 1, 6]), torch.arange(11)
    valid = rows < lengths[:, None]
    inside = in_window(rows[:, None], rows, window) & valid[:, None] & valid[:, :, None]  # (3, 11, 11)
    assert seen_keys(11, lengths.double(), window).equal(inside.sum(-1).double())


def test_a_local_head_that_looks_everywhere_in_its_window_is_not_collapsed():
    """A window of 2 shows 3 tokens, whose entropy is far below a quarter of that of 128."""
    sizes = {"num_layers": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "vocab_size": 32}
    config = ModernBertConfig(**sizes, pad_token_id=0, local_attention=2, global_attn_every_n_layers=2)
    model, statistics = build_model(config).eval(), AttentionStatistics(1, 2)
    ids = torch.randint(3, 32, (2, 128), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        share_pass(model, TokenBatch(ids, torch.full_like(ids, -1)), [statistics])
    result = statistics.result()
    assert result["entropy"]["per_head"][1][0] < 0.25 * result["uniform_entropy"]
    assert result["collapsed_heads"] == 0.0
