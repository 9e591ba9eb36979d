"""Which documents are used: the split by hash, the survey's duplicates and contaminated documents, exclusion."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from tool_calls import run_tool

from megatron_sas.core.cli import InputError
from megatron_sas.corpus.build import documents
from megatron_sas.corpus.build.documents import Exclusions, Selection
from megatron_sas.corpus.build.preprocess import PreprocessSettings, preprocess
from megatron_sas.corpus.readers.base import Reading
from megatron_sas.corpus.readers.registry import input_files, read_units


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text, "id": identity}) + "\n" for identity, text in texts))
    return str(path)


def selected(inputs, **options):
    selection = Selection(**options)
    found = []
    for unit in selection.apply(read_units(inputs, Reading())):
        if unit.starts_document:
            found.append("")
        found[-1] += f"{unit.content or ''}\n"
    return found, selection.counts


def read(path, inputs):
    return Exclusions.read(path, inputs, input_files(inputs))


def test_split_by_hash(tmp_path):
    rng = random.Random(0)
    texts = ["\n".join(f"{rng.random()}" for _ in range(rng.randrange(5))) for _ in range(2000)]
    path = write(tmp_path / "a.jsonl", enumerate(texts + texts[:500]))
    whole, _ = selected([path])
    train, counts = selected([path], split="train", validation_share=0.2, key_characters=30)
    validation, other = selected([path], split="validation", validation_share=0.2, key_characters=30)
    assert sorted(train + validation) == sorted(whole) and len(whole) == 2500
    assert not set(train) & set(validation)  # equal texts are on one side
    assert counts["documents_of_other_split"] == len(validation) and other["documents_of_other_split"] == len(train)
    assert 0.15 < len({*validation}) / len({*whole}) < 0.25
    more, _ = selected([path], split="validation", validation_share=0.3, key_characters=30)
    assert set(validation) < set(more)
    assert selected([path], split="validation", validation_share=0.0)[0] == []
    assert selected([path], split="validation", validation_share=1.0)[0] == whole


@pytest.fixture
def corpus(tmp_path):
    """Two inputs: b repeats texts of a (in another case) and an id; both hold the evaluation sentence."""
    sentence = "A sentence that models are evaluated on."
    a = [(1, "one\ntwo"), (2, "three"), (3, ""), (4, f"Before. {sentence} After."), (5, "three ")]
    b = [(6, "ONE  two"), (7, "other"), (7, "more"), (8, ""), (9, f"{sentence[:-1]}, they say")]
    return [write(tmp_path / "a.jsonl", a), write(tmp_path / "b.jsonl", b)], sentence


def test_excluded_documents_are_left_out(corpus, tmp_path, vocab_file, capsys):
    inputs, sentence = corpus
    arguments = ("--input", *inputs, "--output", tmp_path / "survey.json", "--treebank", tmp_path / "bank.jsonl")
    (tmp_path / "bank.jsonl").write_text(
        json.dumps({"words": [*sentence[:-1].split(), "."], "heads": [0, *[1] * 7], "relns": ["r"] * 8})
    )
    done = run_tool(capsys, "survey_corpus", *arguments)
    assert done.returncode == 0, done.stderr
    assert "bank.jsonl: 1 of 1 sentences found" in done.stdout and "lists 4 documents to exclude" in done.stdout
    path = str(tmp_path / "survey.json")
    texts, counts = selected(inputs, exclusions=read(path, inputs))
    assert texts == ["one\ntwo\n", "three\n", "\n", "other\n", "more\n", "\n"] and counts["documents_excluded"] == 4
    settings = PreprocessSettings(inputs, str(vocab_file), "none", str(tmp_path / "out"), 8, exclude=path)
    header, _ = preprocess(settings)
    assert header["counts"]["documents_excluded"] == 4 and header["counts"]["documents"] == 6
    # One shard at a time, and in another folder
    (tmp_path / "moved").mkdir()
    moved = str(Path(inputs[1]).rename(tmp_path / "moved" / "b.jsonl"))
    assert selected([moved], exclusions=read(path, [moved]))[1]["documents_excluded"] == 2
    # Another file of the same name, with as many documents
    other = write(Path(inputs[1]), [(number, f"other {number}") for number in range(5)])
    with pytest.raises(InputError, match=r"b.jsonl: is not the .*b.jsonl that was surveyed in .*survey.json"):
        read(path, [inputs[0], other])
    with pytest.raises(InputError, match=r"b.jsonl: is not"):
        preprocess(PreprocessSettings([other], str(vocab_file), "none", str(tmp_path / "out2"), 8, exclude=path))
    with pytest.raises(InputError, match=r"--exclude: two inputs are called b.jsonl"):
        read(path, [moved, other])
    # The same file, read otherwise
    exclusions = Exclusions({moved: 4}, {moved: frozenset()})
    with pytest.raises(InputError, match=r"b.jsonl: 5 documents, but 4 when it was surveyed; run tools/"):
        selected([moved], exclusions=exclusions)


def test_not_a_survey(tmp_path):
    old = json.dumps({"format": documents.SURVEY_FORMAT, "version": 1, "inputs": []})
    for content, message in (
        ("{", "not valid JSON .*; make it with tools/survey_corpus.py"),
        ('{"format": "x"}', "another format"),
        ("[]", "not a JSON object; make it with tools/survey_corpus.py"),
        ("{}", "not a survey"),
        (old, "format version 1, this program reads 3; run it again"),
    ):
        (tmp_path / "s.json").write_text(content)
        with pytest.raises(InputError, match=message):
            read(str(tmp_path / "s.json"), [])
    with pytest.raises(InputError, match="no such file; make it with"):
        read(str(tmp_path / "t.json"), [])
