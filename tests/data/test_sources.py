"""Inputs → units: paragraphs, document boundaries, and broken input by file and line."""

from __future__ import annotations

import gzip
import json

import pytest

from megatron_sas.cli import InputError
from megatron_sas.data import sources
from megatron_sas.data.sources import Reading, input_format, read_units


def units(*inputs, **options):
    return [(u.content, u.starts_document, u.where.rpartition(":")[2]) for u in read_units(inputs, Reading(**options))]


def test_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n\n one \ntwo\r\n\n  \n\nthree\n")
    other = tmp_path / "b.txt.gz"
    other.write_bytes(gzip.compress("vier é".encode()))
    assert units(str(path), str(other)) == [
        ("one", True, "3"),
        ("two", False, "4"),
        ("three", True, "8"),
        ("vier é", True, "1"),
    ]


def test_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    records = [{"body": "one\n\n two\n"}, {"body": " \n"}, {"body": "three"}]
    path.write_text("\n".join(map(json.dumps, records)) + "\n\n")
    assert units(str(path), text_field="body") == [
        ("one", True, "1"),
        ("two", False, "1"),
        (None, True, "2"),
        ("three", True, "3"),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a', "invalid JSON"),
        (b'["text"]', "no field 'text'; --text-field"),
        (b'{"body": "a"}', "no field 'text'"),
        (b'{"text": 3}', "not a string"),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b'{"text": "\xff"}', "invalid UTF-8"),
        (b"[" * 100_000, "invalid JSON"),
    ],
)
def test_broken_json(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "last"}\n')
    with pytest.raises(InputError) as error:
        units(str(path))
    assert str(error.value).startswith(f"{path}:2: ") and reason in str(error.value)
    reports = []
    assert [u[0] for u in units(str(path), on_error="skip", report=lambda *r: reports.append(r))] == ["good", "last"]
    assert len(reports) == 1 and reports[0][0] == f"{path}:2" and reason in reports[0][1]


def test_broken_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\n\xff\xfe\nlast\n")
    with pytest.raises(InputError, match=r"a.txt:2: invalid UTF-8"):
        units(str(path))
    assert units(str(path), on_error="skip") == [("good", True, "1"), ("last", False, "3")]


def test_long_paragraphs_are_cut_at_spaces(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_UNIT_CHARACTERS", 20)
    text = "word " * 30 + "x" * 50
    path = tmp_path / "a.txt"
    path.write_text(text)
    reading = Reading()
    parts = [unit.content for unit in read_units([str(path)], reading)]
    assert "".join("".join(parts).split()) == "".join(text.split())
    assert all(len(part) <= 20 for part in parts) and parts[0] == "word word word word"
    assert reading.paragraphs_cut == len(parts) - 1


def test_conllu(tmp_path):
    def sentence(word):
        return f"1\t{word}\t_\t_\t_\t_\t0\troot\t_\t_\n\n"

    path = tmp_path / "a.conllu"
    path.write_text(sentence("a") + sentence("b") + "# newdoc\n" + sentence("c"))
    result = units(str(path))
    assert [(content.text, starts) for content, starts, _ in result] == [("a", True), ("b", False), ("c", True)]
    assert [where for _, _, where in result] == ["1", "3", "5"]


def test_hub_dataset_from_a_local_folder(tmp_path):
    pytest.importorskip("datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "one\\ntwo"}\n{"text": "three"}\n')
    name = f"hf:{folder}:train"
    assert units(name) == [("one", True, "1"), ("two", False, "1"), ("three", True, "2")]
    with pytest.raises(InputError, match="no field 'body'"):
        units(name, text_field="body")
    with pytest.raises(InputError, match="cannot be opened"):
        units(f"hf:{tmp_path}/none:train")


def test_input_names(tmp_path):
    (tmp_path / "a.pdf").write_text("x")
    for name, message in [
        (str(tmp_path / "a.pdf"), "unknown input"),
        (str(tmp_path / "none.txt"), "no such file"),
        ("hf:only", "hf:NAME:SPLIT"),
        ("hf:a::b", "hf:NAME:SPLIT"),
    ]:
        with pytest.raises(InputError, match=message):
            input_format(name)
