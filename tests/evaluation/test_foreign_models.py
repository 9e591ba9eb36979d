"""Encoders of other architectures in the evaluation tools, and the two ways to measure one model."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from bert_pairs import perturbed_bert
from byte_level import modernbert_tokenizer, roberta_tokenizer
from tool_calls import call_tool
from transformers import FNetConfig, FNetForMaskedLM, RobertaConfig, RobertaForMaskedLM

from megatron_sas.core.cli import InputError
from megatron_sas.data.tokenizer import load_tokenizer
from megatron_sas.evaluation.pll import PllTask
from megatron_sas.evaluation.treebank import Sentence
from megatron_sas.evaluation.uas import TreebankTask
from megatron_sas.export.hf import write_hf
from megatron_sas.model.config import BertConfig
from megatron_sas.model.foreign import load_foreign
from megatron_sas.model.modernbert import ModernBertConfig
from megatron_sas.run.reading import load_model

WORDS = ["The", "dogs", "that", "barked", "at", "the", "cat", "ran", "away", "."]
HEADS = [2, 8, 4, 2, 7, 7, 4, 0, 8, 8]
RELATIONS = ["det", "nsubj", "nsubj", "acl", "case", "det", "obl", "root", "advmod", "punct"]
SIZES = {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 66,
    "pad_token_id": 1,
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A treebank of two sentences, and one set of minimal pairs."""
    folder = tmp_path_factory.mktemp("inputs")
    lines = [{"words": WORDS, "heads": HEADS, "relns": RELATIONS}]
    lines.append({"words": WORDS[5:7], "heads": [2, 0], "relns": ["det", "root"]})
    (folder / "trees.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pairs = [("The cats ran.", "The cats runs."), ("The dogs barked.", "The dogs barks."), ("Der Bär aß.", "Der Bär.")]
    names = {"field": "morphology", "linguistics_term": "agreement", "UID": "agreement_1"}
    rows = [{"sentence_good": good, "sentence_bad": bad, **names} for good, bad in pairs]
    (folder / "pairs").mkdir()
    (folder / "pairs" / "agreement_1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _roberta(directory, seed=0):
    """A RoBERTa with random weights and its byte-level tokenizer."""
    tokenizer = roberta_tokenizer()
    torch.manual_seed(seed)
    model = RobertaForMaskedLM(RobertaConfig(vocab_size=len(tokenizer), initializer_range=0.2, **SMALL))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return model.eval(), tokenizer


@pytest.mark.parametrize("config_class", [BertConfig, ModernBertConfig])
def test_both_ways_to_measure_a_model_agree(config_class, tmp_path):
    """Ours, with flash kernels, and transformers', with its maps, on the same directory."""
    tokenizer = modernbert_tokenizer()
    local = {"local_attention": 4, "global_attn_every_n_layers": 2} if config_class is ModernBertConfig else {}
    config = config_class(**SIZES, **local, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    model = perturbed_bert(config)
    write_hf(tmp_path, config, model.state_dict(), tokenizer, "fp32", None)
    ours, tokenizer = load_model(tmp_path)
    theirs = load_foreign(tmp_path)
    sentences = [Sentence(WORDS, [head - 1 for head in HEADS], RELATIONS), Sentence(WORDS[:2], [1, -1], RELATIONS[:2])]
    task = TreebankTask(sentences, tokenizer, 64)
    statistics, counts = [], []
    for one in (ours, theirs):
        observer = task.attention_statistics()
        counts.append(task.evaluate(one, observers=[observer])["counts"])
        statistics.append(observer.result())
    assert counts[0] == counts[1]
    for name in ("entropy", "to_cls", "to_sep"):
        ours_and_theirs = [result[name]["per_head"] for result in statistics]
        np.testing.assert_allclose(*ours_and_theirs, rtol=1e-4, atol=1e-6)
    assert statistics[0]["uniform_entropy"] == statistics[1]["uniform_entropy"]
    pll = PllTask(["The dogs barked.", "The cat ran away."], tokenizer)
    np.testing.assert_allclose(pll.score(ours), pll.score(theirs), rtol=1e-5)


def test_tools_measure_a_roberta(inputs, tmp_path):
    model, tokenizer = _roberta(tmp_path / "roberta")
    call = ("--model", tmp_path / "roberta", "--output")
    call_tool("eval_syntax", *call, tmp_path / "uas.json", "--treebank", inputs / "trees.jsonl")
    call_tool("eval_blimp", *call, tmp_path / "blimp.json", "--blimp", inputs / "pairs")
    text = inputs / "text.txt"
    text.write_text("The dogs that barked at the cat ran away.\n" * 200)
    call_tool("eval_complexity", *call, tmp_path / "twonn.json", "--text", text, "--num-texts", 12, "--seq-length", 16)
    uas, blimp = (json.loads((tmp_path / name).read_text()) for name in ("uas.json", "blimp.json"))
    assert uas["model_config"]["architecture"] == "RobertaForMaskedLM" and uas["num_edges"] == 9
    assert blimp["num_pairs"] == 3 and blimp["model_config"]["max_position_embeddings"] == 64
    sentence = "The dogs barked."
    ids = tokenizer(sentence, return_tensors="pt").input_ids
    expected = 0.0
    for position in range(1, ids.shape[1] - 1):  # by hand: one masked copy per token
        copy = ids.clone()
        copy[0, position] = tokenizer.mask_token_id
        with torch.no_grad():
            expected += float(model(copy).logits[0, position].log_softmax(-1)[ids[0, position]])
    loaded = load_foreign(tmp_path / "roberta")
    (found,) = PllTask([sentence], load_tokenizer(tmp_path / "roberta")).score(loaded)
    assert found == pytest.approx(expected, rel=1e-5)


def test_revisions_make_a_trajectory(inputs, tmp_path):
    for step in (0, 1000):
        _roberta(tmp_path / "models" / f"step_{step}", seed=step)
    call_tool("eval_trajectory", tmp_path / "models", "--treebank", inputs / "trees.jsonl", "--blimp", inputs / "pairs")
    rows = list(csv.DictReader((tmp_path / "models" / "trajectory" / "summary.csv").open()))
    assert [row["step"] for row in rows] == ["0", "1000"]
    assert all(float(row["attention_entropy"]) > 0 and row["uas"] and row["blimp"] for row in rows)


def test_a_model_without_maps_is_refused_for_uas_only(inputs, tmp_path):
    tokenizer = roberta_tokenizer()
    options = {name: value for name, value in SMALL.items() if name != "num_attention_heads"}
    FNetForMaskedLM(FNetConfig(vocab_size=len(tokenizer), **options)).save_pretrained(tmp_path / "fnet")
    tokenizer.save_pretrained(tmp_path / "fnet")
    call = ("--model", tmp_path / "fnet", "--output")
    call_tool("eval_blimp", *call, tmp_path / "blimp.json", "--blimp", inputs / "pairs")
    with pytest.raises(InputError, match=r"^FNetForMaskedLM: its class returns no attention maps"):
        call_tool("eval_syntax", *call, tmp_path / "uas.json", "--treebank", inputs / "trees.jsonl")
    assert not (tmp_path / "uas.json").exists()
