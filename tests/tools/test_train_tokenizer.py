"""tools/train_tokenizer.py, and the whole path with each kind of tokenizer: preprocess, train, evaluate, convert."""

from __future__ import annotations

import itertools
import json
import lzma

import numpy as np
import pytest
import torch
from engine_runs import train, write_inputs
from tool_calls import run_tool
from transformers import AutoModelForMaskedLM, AutoTokenizer

from megatron_sas.corpus.build.preprocess import PreprocessSettings, preprocess
from megatron_sas.data.packed import PackedData
from megatron_sas.data.tokenizer import load_tokenizer, tokenizer_hash
from megatron_sas.evaluation.treebank import load_treebank
from megatron_sas.evaluation.uas import TreebankTask
from megatron_sas.export.hf import to_hf
from megatron_sas.run.reading import load_model
from megatron_sas.run.records import read_records

NOUNS, VERBS = ("dog", "painter", "café", "Walker"), ("see", "help", "watch")


def write_corpus(path, repeats=8):
    """`The dog sees a painter.`, and so on, with trees."""
    with path.open("w") as file:
        for subject, verb, thing, _ in itertools.product(NOUNS, VERBS, NOUNS, range(repeats)):
            words = [("The", 2, "det"), (subject, 3, "nsubj"), (f"{verb}s", 0, "root"), ("a", 5, "det")]
            words += [(thing, 3, "obj"), (".", 3, "punct")]
            for number, (word, head, relation) in enumerate(words, 1):
                misc = "SpaceAfter=No" if number == 5 else "_"
                file.write(f"{number}\t{word}\t_\t_\t_\t_\t{head}\t{relation}\t_\t{misc}\n")
            file.write("\n")
    return path


def write_pairs(directory):
    directory.mkdir()
    pair = {"field": "morphology", "linguistics_term": "agreement", "UID": "agreement"}
    pairs = [{"sentence_good": f"The {n} sees.", "sentence_bad": f"The {n} see.", **pair} for n in NOUNS]
    (directory / "agreement.jsonl").write_text(
        "".join(json.dumps(p | {"pairID": str(i)}) + "\n" for i, p in enumerate(pairs))
    )
    return directory


@pytest.mark.parametrize(("kind", "size"), [("wordpiece", 45), ("unigram", 30), ("bpe", 45)])
def test_every_kind_trains_and_evaluates(kind, size, tmp_path, capsys):
    corpus, pairs = write_corpus(tmp_path / "corpus.conllu"), write_pairs(tmp_path / "blimp")
    tokenizer_path = tmp_path / "tokenizer"
    arguments = ("--input", corpus, "--type", kind, "--vocab-size", size, "--output", tokenizer_path)
    printed = run_tool(capsys, "train_tokenizer", *arguments).stdout
    assert f"{tokenizer_path}: {kind} with {size} entries from 384 paragraphs" in printed

    header, _ = preprocess(
        PreprocessSettings([str(corpus)], str(tokenizer_path), "conllu", str(tmp_path / "packed"), seq_length=32)
    )
    counts = header["counts"]
    assert counts["words"] == 6 * 384 and counts["words_without_piece"] == 0
    lost = counts["edges_cut"] + counts["tail_edges"]
    assert counts["edges"] == 5 * 384 - lost and lost < 0.2 * 5 * 384
    packed = PackedData(tmp_path / "packed")
    starts = packed.boundaries[:, :] & 1 == 1
    assert (starts.sum(), (packed.heads >= 0).sum()) == (starts[packed.boundaries > 0].size, counts["edges"])
    assert starts[packed.heads >= 0].all(), "only first pieces of words have heads"
    rows, places = np.nonzero(packed.heads >= 0)
    assert starts[rows, packed.heads[rows, places]].all(), "and they point to first pieces of words"

    held_out = [str(write_corpus(tmp_path / "held-out.conllu", repeats=1))]
    preprocess(PreprocessSettings(held_out, str(tokenizer_path), "conllu", str(tmp_path / "held-out"), seq_length=32))
    config = write_inputs(tmp_path / "engine")
    trained = {
        "data.train": str(tmp_path / "packed"),
        "data.validation": str(tmp_path / "held-out"),
        "train.steps": 2,
        "checkpoint.every": 2,
        "evaluation.every": 2,
        "evaluation.treebank": str(corpus),
        "evaluation.treebank_sentences": 20,
        "evaluation.blimp": str(pairs),
        "evaluation.blimp_metric": "within_word_l2r",
    }
    train(config, tmp_path / "run", trained)
    final = [r for r in read_records(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "evaluation"][-1]
    assert final["step"] == 2 and 0 <= final["blimp"] <= 1 and final["validation_sas"] > 0

    to_hf(tmp_path / "run", tmp_path / "hf")
    assert tokenizer_hash(load_tokenizer(tmp_path / "hf")) == tokenizer_hash(load_tokenizer(tokenizer_path))
    assert f"{size} vocabulary entries" in (tmp_path / "hf" / "README.md").read_text()
    model, tokenizer = load_model(tmp_path / "hf")
    task = TreebankTask(load_treebank(corpus)[:20], tokenizer, 32)
    assert task.evaluate(model)["uas"] == pytest.approx(final["uas"], abs=1e-6)
    theirs, their_tokenizer = (
        AutoModelForMaskedLM.from_pretrained(tmp_path / "hf"),
        AutoTokenizer.from_pretrained(tmp_path / "hf"),
    )
    ids = their_tokenizer("The dog [MASK] a café.", return_tensors="pt")["input_ids"]
    assert int((ids == 4).sum()) == 1
    with torch.no_grad():
        ours = model(ids, masked_positions=torch.arange(ids.numel())).logits[:, :size]
        assert torch.allclose(theirs(ids).logits[0], ours, atol=1e-5)


def test_messages_and_sampling(tmp_path, capsys):
    with lzma.open(tmp_path / "text.txt.xz", "wt") as file:
        file.writelines(f"the {noun} {verb}s the {noun}\n" for noun, verb in itertools.product(NOUNS * 20, VERBS))
    arguments = ("train_tokenizer", "--input", tmp_path / "text.txt.xz", "--output", tmp_path / "out", "--vocab-size")
    printed = run_tool(capsys, *arguments, 5000, "--type", "wordpiece", "--share", 0.5).stdout
    assert "note: fewer than the 5,000 asked for" in printed
    used = int(printed.split(" paragraphs")[0].split()[-1])
    assert 80 <= used <= 160
    there = run_tool(capsys, *arguments, 50, "--type", "bpe")
    assert there.returncode == 2
    assert there.stderr.endswith("exists already; choose another output or pass --overwrite\n")
    small = run_tool(capsys, *arguments, 5000, "--type", "bpe", "--overwrite")
    assert small.returncode == 2 and small.stderr.splitlines()[-1].startswith("error: --vocab-size 5000: ")
    assert load_tokenizer(tmp_path / "out").get_vocab(), "the older one is still there"
