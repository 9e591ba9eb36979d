"""The tool that writes the embedded corpus, as a user runs it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "make_toy_corpus.py"
SMALL = ["--train-sentences", "2030", "--validation-sentences", "50", "--treebank-sentences", "45", "--pairs", "20"]


def run(*args: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(TOOL), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "toy"
    result = run("--output", path, *SMALL)
    assert result.returncode == 0, result.stderr
    return path


def texts(path: Path) -> list[str]:
    return re.findall(r"^# text = (.*)$", path.read_text(), re.MULTILINE)


def test_contents(corpus):
    counts = json.loads((corpus / "corpus.json").read_text())
    train = (corpus / "train.conllu").read_text()
    assert len(texts(corpus / "train.conllu")) == 2030
    assert len(re.findall("^# newdoc", train, re.MULTILINE)) == 102  # documents of 20, the last of 10
    assert counts["train_words"] == len(re.findall(r"^\d+\t", train, re.MULTILINE))
    seen = set(texts(corpus / "train.conllu"))
    for name, size in (("validation", 50), ("treebank", 45)):
        held_out = texts(corpus / f"{name}.conllu")
        assert len(held_out) == size and not seen & set(held_out)
        assert len(re.findall("^# newdoc", (corpus / f"{name}.conllu").read_text(), re.MULTILINE)) == 3
        ids = re.findall("^# sent_id = (.*)$", (corpus / f"{name}.conllu").read_text(), re.MULTILINE)
        assert len(set(ids)) == size
    sets = sorted((corpus / "blimp").glob("*.jsonl"))
    assert len(sets) == counts["minimal_pair_sets"] >= 6
    for file in sets:
        records = [json.loads(line) for line in file.read_text().splitlines()]
        assert len(records) == 20 and {record["UID"] for record in records} == {file.stem}
        assert not seen & {record[key] for record in records for key in ("sentence_good", "sentence_bad")}


def test_same_fields_as_blimp(corpus, data_dir):
    real = json.loads((data_dir / "blimp" / "determiner_noun_agreement_1.jsonl").open().readline())
    for file in (corpus / "blimp").glob("*.jsonl"):
        toy = json.loads(file.open().readline())
        assert list(toy) == list(real)
        assert [type(value) for value in toy.values()] == [type(value) for value in real.values()]


def test_same_bytes_whatever_the_workers(corpus, tmp_path):
    assert run("--output", tmp_path / "two", *SMALL, "--workers", 2).returncode == 0
    files = [path.relative_to(corpus) for path in corpus.rglob("*") if path.is_file()]
    assert len(files) >= 11
    for file in files:
        assert (corpus / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


def test_seed_and_overwrite(corpus, tmp_path):
    other = tmp_path / "toy"
    assert run("--output", other, *SMALL, "--seed", 1).returncode == 0
    assert (other / "train.conllu").read_bytes() != (corpus / "train.conllu").read_bytes()
    assert (other / "vocab.txt").read_bytes() == (corpus / "vocab.txt").read_bytes()
    refused = run("--output", other, *SMALL)
    assert refused.returncode == 2 and "--overwrite" in refused.stderr and refused.stderr.count("\n") == 1
    assert run("--output", other, *SMALL, "--overwrite").returncode == 0
    assert (other / "train.conllu").read_bytes() == (corpus / "train.conllu").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]


def test_bad_arguments(tmp_path):
    result = run("--output", tmp_path / "toy", "--train-sentences", 0)
    assert result.returncode == 2 and "--train-sentences" in result.stderr and not list(tmp_path.iterdir())
