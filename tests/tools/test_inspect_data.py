"""tools/inspect_data.py on gold parses: what it draws is what the treebank says."""

from __future__ import annotations

import json

import pytest
from tool_calls import call_tool

from megatron_sas.core.cli import InputError
from megatron_sas.corpus.build.preprocess import PreprocessSettings, preprocess
from megatron_sas.corpus.inspect.drawing import segments
from megatron_sas.data.packed import PackedData
from megatron_sas.data.tokenizer import load_tokenizer

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "##s", "."]
SENTENCE = """\
1\tThe\t_\t_\t_\t_\t2\tdet\t_\t_
2\tcats\t_\t_\t_\t_\t3\tnsubj\t_\t_
3\tsat\t_\t_\t_\t_\t0\troot\t_\tSpaceAfter=No
4\t.\t_\t_\t_\t_\t3\tpunct\t_\t_

"""


@pytest.fixture
def prefix(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    (tmp_path / "text.conllu").write_text("# newdoc\n" + SENTENCE * 3 + "# newdoc\n" + SENTENCE * 8)
    inputs, vocabulary = [str(tmp_path / "text.conllu")], str(tmp_path / "vocab.txt")
    preprocess(PreprocessSettings(inputs, vocabulary, "conllu", str(tmp_path / "data"), seq_length=16))
    return tmp_path / "data"


def test_segments_are_the_sentences(prefix, tmp_path):
    packed = PackedData(prefix)
    drawn = segments(packed, 0, load_tokenizer(tmp_path / "vocab.txt"))
    assert [segment.start for segment in drawn] == [1, 6, 11]
    assert drawn[0].tokens == ["the", "cat", "##s", "sat", "."] and drawn[0].first == [True, True, False, True, True]
    assert drawn[0].edges == [(0, 1, "det"), (1, 3, "nsubj"), (4, 3, "punct")]


def test_terminal_page_and_figures(prefix, tmp_path, capsys):
    call_tool("inspect_data", "--data", prefix, "--sequences", 0, "--verify")
    printed = capsys.readouterr().out
    assert "all checksums match" in printed
    assert "    1   ┌─▸ the                det\n    2 ┌─┴─▸ cat                nsubj\n    3 │       ##s" in printed
    assert "repeated sentences" in printed and "words with an edge (coverage)" in printed
    page, figures = tmp_path / "page.html", tmp_path / "figures.json"
    call_tool("inspect_data", "--data", prefix, "--html", page, "--output", figures)
    assert page.read_text().count("<svg") >= 6 and "nsubj" in page.read_text()
    result = json.loads(figures.read_text())
    assert result["edges"] == int((PackedData(prefix).heads >= 0).sum())
    assert set(result["relations"]) == {"det", "nsubj", "punct"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sequences", "9999"], "has sequences 0 to"),
        (["--tokenizer", "other"], "is not the tokenizer that made"),
        (["--html", "there.html"], "exists already"),
    ],
)
def test_refusals(prefix, tmp_path, arguments, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.html").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "vocab.txt").write_text("\n".join([*VOCABULARY, "more"]) + "\n")
    with pytest.raises(InputError, match=message):
        call_tool("inspect_data", "--data", prefix, *arguments)
    assert (tmp_path / "there.html").read_text() == "mine"
