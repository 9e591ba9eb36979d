"""Import of a tokenised dataset with heads: our own data comes back, odd rows are packed anew, faults are counted."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from tool_calls import run_tool
from transformers import PreTrainedTokenizerFast

from megatron_sas.core.cli import InputError
from megatron_sas.corpus.build.preprocess import PreprocessSettings, preprocess
from megatron_sas.corpus.import_dataset import _continuations, import_dataset
from megatron_sas.corpus.inspect.statistics import statistics
from megatron_sas.corpus.train_tokenizer import train_tokenizer
from megatron_sas.data.packed import PackedData

datasets = pytest.importorskip("datasets")
PAD, UNK, CLS, SEP = range(4)


def run(folder, vocab_file, output, **options):
    return import_dataset(f"hf:{folder}:train", str(vocab_file), str(output), **options)


def test_a_treebank_comes_back(data_dir, tmp_path):
    """Packed by us, published in the paper's form, imported: the same tokens, heads, relations, and nearly the same
    marks, which that form does not have."""
    vocab = data_dir / "bert_vocab" / "vocab.txt"
    treebank = data_dir / "ud_ewt" / "en_ewt-ud-dev.conllu"
    preprocess(PreprocessSettings([str(treebank)], str(vocab), "conllu", str(tmp_path / "own"), 128))
    own = PackedData(tmp_path / "own")
    relations = np.where(own.deprels == 0, -1, own.deprels.astype(int) - 1)
    columns = {"input_ids": own.tokens.tolist(), "heads": own.heads.tolist(), "relns": relations.tolist()}
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "published")
    (tmp_path / "names.txt").write_text("\n".join(own.relations[1:]))
    header = run(
        tmp_path / "published", vocab, tmp_path / "back", seq_length=128, relations=str(tmp_path / "names.txt")
    )
    back = PackedData(tmp_path / "back")
    back.verify()
    assert np.array_equal(back.tokens, own.tokens) and np.array_equal(back.heads, own.heads)
    assert np.array_equal(np.array(back.relations)[back.deprels], np.array(own.relations)[own.deprels])
    assert (
        (back.boundaries ^ own.boundaries) & 1
    ).sum() < 0.001 * own.boundaries.size  # rests of words cut between sequences
    found, true = (back.boundaries & 2).astype(bool), (own.boundaries & 2).astype(bool)
    assert (found & true).sum() > 0.995 * true.sum()
    assert found.sum() < 1.4 * true.sum()  # where edges were lost, a sentence seems to be several
    counts = header["counts"]
    assert counts["rows"] == counts["rows_as_they_are"] == counts["sequences"] == len(own)
    assert counts["edges"] == (own.heads >= 0).sum()


def write(folder, rows):
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def row(ids, heads, deprels):
    return {"input_ids": ids, "heads": heads, "relns": deprels}


def test_rows_by_hand(vocab_file, tmp_path):
    rows = [
        # the cat ##s sat | a root that points to itself, relations by name
        row(
            [CLS, 5, 6, 9, 8, 14, 18, SEP],
            [-1, 2, 4, -1, 4, 4, 4, -1],
            ["", "det", "nsubj", "", "root", "neg", "p", ""],
        ),
        # heads at special tokens, outside, clamped to the last place
        row([CLS, 5, 6, 9, 8, 14, 18, SEP], [-1, 0, 9, -1, 2, 7, 4, 2], ["", "det", "nsubj", "", "x", "neg", "p", "x"]),
        # not parsed
        row([CLS, 5, 6, 9, 8, UNK, 18, SEP], [-1] * 8, [""] * 8),
        # padded: packed anew, with what comes next
        row([CLS, 5, 6, 9, SEP, PAD, PAD, PAD], [-1, 2, -1, -1, -1, -1, -1, -1], ["", "det", "root"] + [""] * 5),
        row([CLS, 10, 11, SEP], [-1, -1, -1, -1], [""] * 4),
        row([5, 6, 33], [-1] * 3, [""] * 3),
        row([5, 6], [-1], [""]),
        row([], [], []),
        row([5, None], [-1, -1], ["", ""]),
        row(None, [-1], [""]),
    ]
    header = run(write(tmp_path / "set", rows), vocab_file, tmp_path / "out", seq_length=8)
    packed = PackedData(tmp_path / "out")
    assert packed.tokens.tolist() == [*(rows[n]["input_ids"] for n in range(3)), [CLS, 5, 6, 9, SEP, 10, 11, SEP]]
    assert packed.heads.tolist() == [
        [-1, 2, 4, -1, -1, 4, 4, -1],
        [-1, -1, -1, -1, 2, -1, 4, -1],
        [-1] * 8,
        [-1, 2, -1, -1, -1, -1, -1, -1],
    ]
    names = [[packed.relations[number] for number in numbers] for numbers in packed.deprels]
    assert names[0] == rows[0]["relns"] and names[3] == ["", "det", "root", "", "", "", "", ""]
    assert packed.boundaries.tolist() == [
        [0, 3, 1, 0, 1, 1, 1, 0],
        [0, 3, 3, 0, 1, 1, 1, 0],  # the lost edge of the first word makes it a sentence
        [0, 3, 1, 0, 1, 1, 1, 0],
        [0, 3, 1, 0, 0, 3, 0, 0],
    ]
    expected = {
        "rows": 10,
        "rows_as_they_are": 3,
        "rows_packed_anew": 2,
        "rows_left_out": 5,
        "rows_without_edges": 2,
        "pieces": 23,
        "pieces_unknown": 1,
        "sequences": 4,
        "edges": 7,
        "edges_to_self": 1,
        "edges_outside": 1,
        "edges_of_specials": 3,
        "edges_to_last_token": 1,
        "relations_negative": 0,
        "edges_across_separators": 0,
        "edges_cut": 0,
        "tail_pieces": 0,
        "tail_edges": 0,
    }
    assert header["counts"] == expected
    assert {name: entry["count"] for name, entry in header["report"].items()} == {
        "ids outside the vocabulary": 1,
        "columns of different lengths": 1,
        "an empty row": 1,
        "values missing": 2,
    }


@pytest.mark.parametrize("form", ["numpy", "torch"])
def test_a_format_that_was_set_before_saving(vocab_file, tmp_path, form):
    ids, heads = [CLS, 5, 6, 9, 8, 14, 18, SEP], [-1, 2, 4, -1, -1, 4, 4, -1]
    rows = datasets.Dataset.from_list([row(ids, heads, [-1] * 8)] * 3).with_format(form)
    rows.save_to_disk(tmp_path / "set")
    header = run(tmp_path / "set", vocab_file, tmp_path / "out", seq_length=8)
    assert header["counts"]["rows_as_they_are"] == 3
    assert PackedData(tmp_path / "out").heads.tolist() == [heads] * 3


def test_every_edge_is_counted_once(vocab_file, tmp_path):
    """Written, or dropped for one of the reasons: in rows of any length, padded, with separators and odd heads."""
    rng = np.random.default_rng(0)
    rows = []
    for size in rng.integers(4, 40, 200):
        ids = rng.integers(5, 30, size)
        ids[[0, -1]] = CLS, SEP
        ids[rng.random(size) < 0.1] = SEP
        ids = np.append(ids, np.full(rng.integers(3), PAD))
        heads = np.where(rng.random(len(ids)) < 0.6, rng.integers(-3, len(ids) + 3, len(ids)), -1)
        rows.append(row(ids.tolist(), heads.tolist(), [-1] * len(ids)))
    counts = run(write(tmp_path / "set", rows), vocab_file, tmp_path / "out", seq_length=16)["counts"]
    assert counts["rows_packed_anew"] > 150 and counts["rows_as_they_are"] > 0 and counts["rows_left_out"] == 0
    kinds = ("edges", "edges_to_self", "edges_outside", "edges_of_specials", "edges_across_separators", "edges_cut")
    assert all(counts[kind] > 0 for kind in kinds)
    given = sum(head != -1 for entry in rows for head in entry["heads"])
    assert sum(counts[kind] for kind in kinds) + counts["tail_edges"] == given


def test_words_by_the_marking_of_the_tokenizer():
    """A "##" in a SentencePiece vocabulary is text; its words begin with "▁"."""
    vocabulary = [(piece, 0.0) for piece in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "▁the", "s", "##", "▁##")]
    unigram = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram(vocabulary, unk_id=1)))
    assert _continuations(unigram, 9).tolist() == [True] * 5 + [False, True, True, False]
    wordpiece = train_tokenizer(["the cats sat", "the cat"] * 20, "wordpiece", 60)
    found = {piece for piece, number in wordpiece.get_vocab().items() if _continuations(wordpiece, 60)[number]}
    assert found == {piece for piece in wordpiece.get_vocab() if piece.startswith("##")} and len(found) > 3


def test_parsed_and_unparsed_text_in_one_row(vocab_file, tmp_path):
    """An unparsed run is one sentence, beside parsed ones as in rows without any edge."""
    ids = [CLS, 5, 6, SEP, 10, 14, 18, SEP, 5, 7, 8, SEP]
    heads = [-1, 2, -1, -1, -1, -1, -1, -1, 9, 10, -1, -1]
    rows = [row(ids, heads, [-1] * 12), row(ids, [-1] * 12, [-1] * 12)]
    run(write(tmp_path / "set", rows), vocab_file, tmp_path / "out", seq_length=12)
    packed = PackedData(tmp_path / "out")
    assert packed.boundaries.tolist() == [[0, 3, 1, 0, 3, 1, 1, 0, 3, 1, 1, 0]] * 2
    found = statistics(packed)
    assert (found["sentences"], found["words"], found["unparsed_words"]) == (6, 16, 3 + 8)


@pytest.mark.parametrize("names", [None, "det nsubj root neg punct"])
def test_negative_relations_are_none(vocab_file, tmp_path, names):
    ids, heads = [CLS, 5, 6, 9, 8, 14, 18, SEP], [-1, 2, 4, -1, -1, 4, 4, -1]
    folder = write(tmp_path / "set", [row(ids, heads, [-100, 0, -1, -100, 2, -2, 4, -100])])
    if names is not None:
        (tmp_path / "names.txt").write_text(names)
        names = str(tmp_path / "names.txt")
    header = run(folder, vocab_file, tmp_path / "out", seq_length=8, relations=names)
    packed = PackedData(tmp_path / "out")
    expected = ["", "det", "root", "punct"] if names else ["", "relation-0", "relation-2", "relation-4"]
    assert packed.relations == expected and packed.deprels.tolist() == [[0, 1, 0, 0, 2, 0, 3, 0]]
    assert packed.boundaries.tolist() == [[0, 3, 1, 0, 1, 1, 1, 0]]
    assert header["counts"]["relations_negative"] == 4


def test_what_cannot_be_imported(vocab_file, tmp_path):
    folder = write(tmp_path / "a", [{"input_ids": [CLS, SEP], "heads": [-1, -1]}])
    with pytest.raises(InputError, match="has no column relns; needed are input_ids, heads, relns"):
        run(folder, vocab_file, tmp_path / "out", seq_length=8)
    folder = write(tmp_path / "b", [row([CLS, 5, SEP], [-1] * 3, [-1, 3, -1])])
    with pytest.raises(InputError, match="1 rows, 0 of them left out; nothing fills a sequence of 8"):
        run(folder, vocab_file, tmp_path / "out", seq_length=8)
    with pytest.raises(InputError, match="the name is not UTF-8"):
        run(Path(os.fsdecode(b"\xe9")), vocab_file, tmp_path / "out", seq_length=8)
    (tmp_path / "names.txt").write_text("a b c")
    with pytest.raises(InputError, match="names 3 relations, but the dataset has number 3"):
        run(folder, vocab_file, tmp_path / "out", seq_length=8, relations=str(tmp_path / "names.txt"))
    folder = write(tmp_path / "c", [row([CLS] + [5] * 300 + [SEP], [-1] * 302, [-1, *range(300), -1])])
    with pytest.raises(InputError, match="more than 255 relation names"):
        run(folder, vocab_file, tmp_path / "out", seq_length=8)
    assert not list(tmp_path.glob("*out*"))


def test_command_line(vocab_file, tmp_path, capsys):
    folder = write(
        tmp_path / "a", [row([CLS, 5, 6, 9, 8, 14, 18, SEP], [-1, 2, 4, -1, -1, 4, 4, -1], [-1, 0, 1, -1, 2, 3, 4, -1])]
    )
    arguments = ("--input", f"hf:{folder}:train", "--tokenizer", vocab_file, "--seq-length", 8)
    done = run_tool(capsys, "import_dataset", *arguments, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "             4  edges written\n" in done.stdout
    assert "begins with '[CLS] the cats sat not. [SEP]'" in done.stdout
    assert PackedData(tmp_path / "out").relations == [
        "",
        "relation-0",
        "relation-1",
        "relation-2",
        "relation-3",
        "relation-4",
    ]
