"""Reading every layout of GLUE."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from glue_layouts import LAYOUTS

from megatron_sas.core.cli import InputError
from megatron_sas.glue.data import Columns, read_file, read_hub, task_files
from megatron_sas.glue.tasks import TASKS

EXPECTED = {
    "cola": ([("Our friends won't buy \"this.",), ("The box fell",)], [1, 0]),
    "sst2": ([("hide new secretions ",), ("a gorgeous film ",)], [0, 1]),
    "mrpc": ([('He said " yes .', "He agreed ."), ("A .", "B .")], [1, 0]),
    "stsb": ([("A plane.", "An air plane."), ("A man.", "A cat.")], [5.0, 0.25]),
    "qqp": ([("How?", "Why?"), ("Who?", "Who is?")], [0, 1]),
    "mnli": ([("It rains.", "It is wet."), ("It rains.", "It is dry.")], [1, 2]),
    "qnli": ([("What?", "This."), ("Who?", "That.")], [0, 1]),
    "rte": ([("A.", "B."), ("C.", "D.")], [1, 0]),
    "wnli": ([("A.", "B."), ("C.", "D.")], [1, 0]),
}


@pytest.mark.parametrize("name", TASKS)
def test_layouts_of_the_download(name, tmp_path):
    task = TASKS[name]
    folder = tmp_path / task.folder
    folder.mkdir()
    for file in ("train.tsv", *task.validation):
        (folder / file).write_bytes(("\ufeff" + "\r\n".join(LAYOUTS[name]) + "\r\n").encode())
    train, validation = task_files(task, tmp_path)
    assert len(validation) == (2 if name == "mnli" else 1)
    examples = read_file(task, train)
    assert (examples.texts, examples.labels.tolist()) == EXPECTED[name]
    assert examples.labels.dtype == (np.float32 if name == "stsb" else np.int64)
    # The hub's names as JSON lines, with numbers for labels.
    texts, labels = EXPECTED[name]
    rows = [dict(zip([group[0] for group in task.text], text, strict=True)) | {"label": label, "idx": 0}
            for text, label in zip(texts, labels, strict=True)]  # fmt: skip
    path = tmp_path / "hub.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    again = read_file(task, path)
    assert (again.texts, again.labels.tolist()) == EXPECTED[name]
    assert again.source["sha256"] == examples.source["sha256"] and again.source["path"] != examples.source["path"]
    validation[-1].unlink()
    with pytest.raises(InputError, match=rf"{validation[-1].name}: no such file"):
        task_files(task, tmp_path)


def test_named_columns_and_class_names(tmp_path):
    path = tmp_path / "mine.tsv"
    path.write_text("good\tbad\twords\nacceptable\t1\tA cat.\nunacceptable\t0\tCat a.\n")
    examples = read_file(TASKS["cola"], path, Columns(["words"], "good"))
    assert (examples.texts, examples.labels.tolist()) == ([("A cat.",), ("Cat a.",)], [1, 0])
    # The same file with other columns is other data.
    sums = {read_file(TASKS["cola"], path, Columns([text], "bad")).source["sha256"] for text in ("words", "good")}
    assert len(sums) == 2
    assert examples.source["sha256"] in sums


def test_lines_with_too_few_columns(tmp_path, capsys):
    """QQP as distributed has some."""
    path = tmp_path / "train.tsv"
    good = [f"{n}\t1\t2\tHow?\tWhy?\t{n % 2}" for n in range(200)]
    path.write_text("\n".join([LAYOUTS["qqp"][0], *good, "201\t1\t2\tbroken"]) + "\n")
    assert len(read_file(TASKS["qqp"], path)) == 200
    assert "left out 1 of 201 lines with too few columns" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "name", "content", "message"),
    [
        ("cola", "a.tsv", "", "no examples in it"),
        ("cola", "a.jsonl", "", "no examples in it"),
        ("sst2", "a.tsv", "sentence\tlabel\n", "no examples in it"),
        ("sst2", "a.tsv", "text\tlabel\nx\t1\ny\t0\n", ":2: no column 'sentence', found 'text', 'label'"),
        ("mrpc", "a.jsonl", '{"sentence1": "a", "label": 1}\n', ":1: no column 'sentence2' or '#2 String'"),
        ("cola", "a.tsv", "s\t1\t\ta\ns\t2\t\tb\n", ":2: label '2' is none of 0 to 1 or unacceptable, acceptable"),
        ("mnli", "a.jsonl", '{"premise": "a", "hypothesis": "b", "label": -1}\n', "test data without labels"),
        ("stsb", "a.jsonl", '{"sentence1": "a", "sentence2": "b", "label": 5.5}\n', "5.5 is not a score from 0 to 5"),
        ("stsb", "a.jsonl", '{"sentence1": "a", "sentence2": "b", "label": "x"}\n', "'x' is not a score"),
        ("cola", "a.tsv", "s\t1\t\ta\ns\t1\t\tb\n", "all 2 labels are 'acceptable'"),
        ("cola", "a.tsv", "one\ntwo\n", ":1: fewer than the 4 tab-separated columns that cola needs"),
        ("cola", "a.jsonl", "{\n", ":1: not JSON"),
        ("cola", "a.jsonl", "[" * 100_000, ":1: not JSON"),
        ("cola", "a.jsonl", '{"sentence": "\\ud83d", "label": 1}\n', ":1: half of a surrogate pair in '\\ud83d'"),
        ("cola", "a.jsonl", "[1]\n", ":1: not a JSON object"),
        ("cola", "a.jsonl", '{"sentence": 3, "label": 1}\n', "3 is not a text"),
        ("cola", "a.csv", "x", "unknown kind of file '.csv'"),
    ],
)  # fmt: skip
def test_bad_files_are_one_line(task, name, content, message, tmp_path):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        read_file(TASKS[task], path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_data_of_the_hub(tmp_path):
    """A data set of the hub's columns and splits, from a folder instead of the network."""
    import datasets

    texts, labels = EXPECTED["mrpc"]
    columns = {"sentence1": [a for a, _ in texts], "sentence2": [b for _, b in texts], "label": labels, "idx": [0, 1]}
    for split in ("train", "validation"):
        datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / split)
    examples = read_hub(TASKS["mrpc"], "validation", hub=str(tmp_path))
    assert (examples.texts, examples.labels.tolist()) == EXPECTED["mrpc"]
    assert examples.source.keys() == {"hub", "split", "sha256"}
    assert (examples.source["hub"], examples.source["split"]) == (str(tmp_path), "validation")
