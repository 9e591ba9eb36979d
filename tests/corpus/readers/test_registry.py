"""Inputs → units: paragraphs, document boundaries, and broken input by file and line."""

from __future__ import annotations

import gzip
import json
import lzma
import random
from pathlib import Path

import pytest
from preprocessing import run

from megatron_sas.core.cli import InputError
from megatron_sas.corpus.build.preprocess import PreprocessSettings
from megatron_sas.corpus.build.shards import preprocess_shards
from megatron_sas.corpus.build.skipped import SkipReport
from megatron_sas.corpus.inspect.survey import SurveySettings, survey
from megatron_sas.corpus.readers.base import Reader, Reading, Unit
from megatron_sas.corpus.readers.registry import (
    READERS_BY_SCHEME,
    READERS_BY_SUFFIX,
    input_usage,
    read_units,
    reader_of,
)
from megatron_sas.corpus.readers.text_lines import DamagedFile


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
    skipped = SkipReport()
    assert [u[0] for u in units(str(path), on_error="skip", skipped=skipped)] == ["good", "last"]
    (kind,) = skipped.report().values()
    assert kind["count"] == skipped.count == 1
    assert kind["examples"][0]["where"] == f"{path}:2" and reason in kind["examples"][0]["reason"]


def test_broken_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\n\xff\xfe\nlast\n")
    with pytest.raises(InputError, match=r"a.txt:2: invalid UTF-8"):
        units(str(path))
    assert units(str(path), on_error="skip") == [("good", True, "1"), ("last", False, "3")]


def test_long_paragraphs_are_cut_at_spaces(tmp_path):
    text = "word " * 30 + "x" * 50
    path = tmp_path / "a.txt"
    path.write_text(text)
    reading = Reading(max_unit_characters=20)
    parts = [unit.content for unit in read_units([str(path)], reading)]
    assert "".join("".join(parts).split()) == "".join(text.split())
    assert all(len(part) <= 20 for part in parts) and parts[0] == "word word word word"
    assert reading.counts["paragraphs_cut"] == len(parts) - 1


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
            reader_of(name)


def test_control_characters_are_taken_out(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "a\x00b\x0bc\r\n\ufeffd\te\x85f \x1b[1mg"}) + "\n")
    reading = Reading()
    assert [unit.content for unit in read_units([str(path)], reading)] == ["ab c", "d\te f [1mg"]
    assert reading.counts["paragraphs_with_controls"] == 2


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_archives_of_no_bytes(tmp_path, suffix):
    """What a full disk or a download that failed leaves is no empty input."""
    pytest.importorskip("zstandard")
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(b"")
    with pytest.raises(DamagedFile, match=r"a.txt\.\w+: damaged compressed file \(it is empty, without even a head"):
        units(str(path))
    with pytest.raises(InputError, match=r"1 of 1 records left out and 100.0% of the file unread, mostly for 'damaged"):
        units(str(path), on_error="skip", skipped=SkipReport(max_skipped=0.99))
    assert units(str(path), on_error="skip", skipped=SkipReport(max_skipped=1.0)) == []


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
def test_damaged_archives(tmp_path, suffix):
    """What comes before the damage is used when as much may be lost; a file that is cut off may lack anything."""
    rng = random.Random(0)
    lines = [json.dumps({"text": " ".join(str(rng.random()) for _ in range(50))}) for _ in range(600)]
    whole = {".gz": gzip, ".xz": lzma}[suffix].compress("\n".join(lines).encode())
    path = tmp_path / f"a.jsonl{suffix}"
    middle = len(whole) // 2
    cases = {1.0: whole[:middle]}
    if suffix == ".xz":  # in a .gz, damage turns into other text until a checksum at its end
        cases[0.6] = whole[:middle] + bytes(1000) + whole[middle + 1000 :]
    for loss, content in cases.items():
        path.write_bytes(content)
        with pytest.raises(InputError, match="damaged compressed file"):
            units(str(path))
        with pytest.raises(InputError, match=r"1 of \d+ records left out and .* of the file unread, mostly for 'dam"):
            units(str(path), on_error="skip", skipped=SkipReport(max_skipped=0.3))
        found = units(str(path), on_error="skip", skipped=SkipReport(max_skipped=loss))
        assert [unit[0] for unit in found] == [json.loads(line)["text"] for line in lines[: len(found)]]
        assert 220 < len(found) < 330


def test_too_much_is_lost(tmp_path):
    (tmp_path / "good.txt").write_text("one\n" * 90)
    (tmp_path / "bad.txt").write_bytes(b"one\n\n" * 9 + b"\xff\n" * 1)
    names = [str(tmp_path / "good.txt"), str(tmp_path / "bad.txt")]
    assert len(units(*names, on_error="skip", skipped=SkipReport(max_skipped=0.1))) == 99
    with pytest.raises(InputError) as error:  # a share of one input, not of all
        units(*names, on_error="skip", skipped=SkipReport(max_skipped=0.09))
    assert str(error.value) == (
        f"{names[1]}: 1 of 10 records left out, mostly for 'invalid UTF-8'; more than --max-skipped 0.09 allows: "
        "mend the file or raise it"
    )


def test_parts_of_a_hub_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"text": f"row {number}", "id": number} for number in range(10)]
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    for name in (folder, tmp_path / "saved"):
        parts = [[unit[0] for unit in units(f"hf:{name}:train@{part}/3")] for part in range(3)]
        assert parts == [[row["text"] for row in rows[part::3]] for part in range(3)]
    with pytest.raises(InputError, match="parts are numbered from 0 to 2"):
        units(f"hf:{folder}:train@3/3")


def test_parts_of_a_hub_dataset_keep_the_rows_of_a_document_together(tmp_path):
    """Rows of a document follow each other, whether parts are row groups, saved rows, or what is left of all rows."""
    datasets = pytest.importorskip("datasets")
    rows = [{"text": str(number)} for number in range(10)]
    for kind in ("lines", "groups"):
        (tmp_path / kind).mkdir()
    (tmp_path / "lines" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "groups" / "train.parquet", batch_size=2)
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    for kind in ("lines", "groups", "saved"):
        found = []
        for part in range(3):
            for content, starts, _ in units(f"hf:{tmp_path / kind}:train@{part}/3", rows_per_document=3):
                if starts:
                    found.append([])
                found[-1].append(int(content))
        assert sorted(number for document in found for number in document) == list(range(10))
        for document in found:
            assert document == list(range(document[0], document[0] + len(document))) and len(document) <= 3
        assert len(found) <= 6


def test_documents_of_rows_without_the_broken_ones(tmp_path):
    """Also where a document would begin, and a line that is cut into parts is one row."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n\xff\ntwo\n" + b"\xff\n" + b"word " * 5000 + b"\nfour\n\xff\n")
    found = units(str(path), on_error="skip", rows_per_document=2)
    assert [(content[:4], starts) for content, starts, _ in found] == [
        ("one", True),
        ("two", False),
        ("word", True),
        ("word", False),
        ("four", False),
    ]
    other = tmp_path / "b.txt"
    other.write_text("five\nsix")
    assert [starts for _, starts, _ in units(str(other), str(other), rows_per_document=3)] == [True, False] * 2


def test_a_line_makes_a_suffix_and_another_a_scheme(tmp_path, vocab_file, monkeypatch):
    """Reading, headers, shards and help know them by these."""

    def tables(name, reading):
        for number, line in enumerate(Path(name.removeprefix("table:")).read_text().splitlines(), 1):
            yield Unit(line.replace("\t", " "), True, f"{name}:{number}")

    class Tables(Reader):
        def check(self, name):
            assert name.startswith("table:")

        def label(self, name):
            return name

        def version(self, name):
            return {"revision": "7"}

        def output_name(self, name):
            return "made"

    monkeypatch.setitem(READERS_BY_SUFFIX, ".tsv", Reader(tables, "a row a document"))
    monkeypatch.setitem(READERS_BY_SCHEME, "table:", Tables(tables, "FILE, a table"))
    (tmp_path / "a.tsv").write_text("the\tcat\n" * 9)
    assert ".tsv (a row a document); each also" in input_usage() and input_usage().endswith("or table:FILE, a table")
    header = run(tmp_path / "a.tsv", vocab_file, "none", tmp_path / "file", seq_length=8)
    assert header["inputs"] == ["a.tsv"] and header["counts"]["documents"] == 9
    name = f"table:{tmp_path / 'a.tsv'}"
    settings = PreprocessSettings([name], str(vocab_file), "none", str(tmp_path / "shards"), seq_length=8)
    (header,) = preprocess_shards(settings, log=lambda line: None)
    assert header["input_files"] == [{"name": name, "revision": "7"}]
    assert (tmp_path / "shards" / "made.json").is_file()
    assert survey(SurveySettings([name]))["inputs"][0]["file"] == {"name": name, "revision": "7"}
