"""The CoNLL-U reader on real and on broken files."""

from __future__ import annotations

import pytest
from preprocessing import row

from megatron_sas.core.cli import InputError
from megatron_sas.corpus.readers.base import Reading
from megatron_sas.corpus.readers.conllu import read_conllu


def write(path, *rows, encoding="utf-8"):
    path.write_bytes("\n".join(rows).encode(encoding) + b"\n\n")
    return path


def test_words_spans_and_multiword_tokens(tmp_path):
    path = write(
        tmp_path / "a.conllu",
        "# newdoc id = x",
        "# text = I don't go zum (Arzt).",
        row(1, "I", 4, "nsubj"),
        "\t".join(["2-3", "don't"] + ["_"] * 8),
        row(2, "do", 4, "aux"),
        row(3, "n't", 4, "advmod"),
        row(4, "go", 0, "root"),
        "\t".join(["4.1", "gone"] + ["_"] * 8),
        "\t".join(["5-6", "zum"] + ["_"] * 8),
        row(5, "zu", 8, "case"),
        row(6, "dem", 8, "det"),
        row(7, "(", 8, "punct", "SpaceAfter=No"),
        row(8, "Arzt", 4, "obl", "X=1|SpaceAfter=No"),
        row(9, ")", 8, "punct", "SpaceAfter=No"),
        row(10, ".", 4, "punct"),
    )
    (sentence,) = read_conllu(path)
    assert sentence.text == "I don't go zum (Arzt)."
    assert sentence.words == ["I", "do", "n't", "go", "zu", "dem", "(", "Arzt", ")", "."]
    assert sentence.heads == [3, 3, 3, -1, 7, 7, 7, 3, 7, 3]
    assert [sentence.text[a:b] for a, b in sentence.spans] == ["I", "do", "n't", "go", "zum", "", "(", "Arzt", ")", "."]
    assert sentence.deprels[3] == "root"
    assert sentence.newdoc and sentence.line == 1


def test_every_ewt_sentence_rebuilds_its_text(data_dir):
    count = words = 0
    for sentence in read_conllu(data_dir / "ud_ewt" / "en_ewt-ud-dev.conllu"):
        text = next(c.removeprefix("text = ") for c in sentence.comments if c.startswith("text = "))
        assert sentence.text == text
        for (start, end), word in zip(sentence.spans, sentence.words, strict=True):
            assert text[start:end] == word
        count, words = count + 1, words + len(sentence.words)
    assert (count, words) == (2001, 25147)  # as the treebank's own README counts


GOOD = [row(1, "good", 0, "root"), ""]


@pytest.mark.parametrize(
    ("rows", "line", "reason"),
    [
        ([row(1, "a", 5)], 3, "column HEAD is 5: word 1 has head 5, outside 0..1"),
        ([row(1, "a", 2), row(2, "b", 3), row(3, "c", 2)], 4, "cycle"),
        ([row(1, "a", 1)], 3, "cycle"),
        ([row(1, "a", "_")], 3, "HEAD is '_'"),
        ([row(1, "a", -1)], 3, "HEAD is '-1'"),
        ([row(1, "a", 0) + "\tx"], 3, "11 tab-separated columns"),
        (["1 a _ _ _ _ 0 root _ _"], 3, "1 tab-separated columns"),
        ([row(1, "a", 0), row(3, "b", 1)], 4, "ID is 3 where 2 is due"),
        ([row("x", "a", 0)], 3, "ID is 'x'"),
        ([row(1, "", 0)], 3, "FORM is empty"),
        (["\t".join(["1-2", "ab"] + ["_"] * 8), row(1, "a", 0)], 3, "multiword token ends at word 2"),
        (["\t".join(["1-1", "ab"] + ["_"] * 8), row(1, "a", 0)], 3, "empty or overlaps"),
    ],
)
def test_broken_sentences_are_refused_or_skipped(tmp_path, rows, line, reason):
    path = write(tmp_path / "a.conllu", *GOOD, *rows, "", row(1, "last", 0, "root"))
    with pytest.raises(InputError) as error:
        list(read_conllu(path, Reading(on_error="refuse").bad))
    assert str(error.value).startswith(f"{path}:{line}: ") and reason in str(error.value)
    assert "--on-error skip" in str(error.value)
    reports = []
    sentences = list(read_conllu(path, lambda *report: reports.append(report)))
    assert [s.words for s in sentences] == [["good"], ["last"]]
    assert len(reports) == 1 and reports[0][0] == f"{path}:{line}" and reason in reports[0][1]


def test_a_reader_without_the_option_does_not_advise_it(tmp_path):
    with pytest.raises(InputError, match=r"a\.conllu:1: column HEAD is 1: word 1 is its own head, .*; correct it$"):
        list(read_conllu(write(tmp_path / "a.conllu", row(1, "a", 1))))


def test_invalid_utf8_and_newdoc_of_a_skipped_sentence(tmp_path):
    path = write(
        tmp_path / "a.conllu", row(1, "a", 0), "", "# newdoc", row(1, "é", 0), "", row(1, "b", 0), encoding="latin-1"
    )
    with pytest.raises(InputError, match=r"a.conllu:4: invalid UTF-8"):
        list(read_conllu(path))
    sentences = list(read_conllu(path, lambda *_: None))
    assert [(s.words, s.newdoc) for s in sentences] == [(["a"], False), (["b"], True)]


def test_comments_without_words_are_no_sentence(tmp_path):
    path = write(tmp_path / "a.conllu", "# newdoc", "", "", row(1, "a", 0), "", "# the end")
    (sentence,) = read_conllu(path)
    assert sentence.newdoc
