"""Hugging Face datasets: parts that divide the rows, and versions that are told apart. Nothing here needs a network."""

from __future__ import annotations

import json
import shutil
from itertools import chain

import pytest

from megatron_sas.core.cli import InputError
from megatron_sas.corpus.build.documents import Exclusions
from megatron_sas.corpus.build.merge import merge
from megatron_sas.corpus.build.preprocess import PreprocessSettings
from megatron_sas.corpus.build.shards import preprocess_shards
from megatron_sas.corpus.import_dataset import import_dataset
from megatron_sas.corpus.inspect.survey import SurveySettings, survey
from megatron_sas.corpus.readers import hub
from megatron_sas.corpus.readers.hub import check_name, dataset_version, open_dataset, read_rows
from megatron_sas.corpus.readers.registry import input_files

datasets = pytest.importorskip("datasets")
OLD, NEW = "a" * 40, "b" * 40


def parquet(folder, *sizes, group=100):
    """Files of so many rows, in row groups of `group`; the texts, file by file."""
    folder.mkdir()
    files = []
    for number, size in enumerate(sizes):
        files.append([f"the cat sat {number} {row}" for row in range(size)])
        path = folder / f"train-{number:05}-of-{len(sizes):05}.parquet"
        datasets.Dataset.from_dict({"text": files[-1]}).to_parquet(path, batch_size=group)
    return files


def texts(name):
    return [row["text"] for row in read_rows(name)]


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    """A hub with one dataset, `org/NAME`: `commits` by revision, whose files lie in folders of these names."""
    commits, original = {}, datasets.load_dataset_builder

    def load(path, name=None, revision=None):
        if not path.startswith("org/"):
            return original(path, name)
        builder = original(str(tmp_path / commits[revision]), name)
        builder.hash = commits[revision]
        return builder

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    hub._hub_builder.cache_clear()
    yield commits
    hub._hub_builder.cache_clear()


def test_names():
    match = check_name("hf:org/set@refs/convert/parquet:en:train@3/16")
    assert list(match.groupdict().values()) == ["org/set", "refs/convert/parquet", "en", "train", "3", "16"]
    assert check_name("hf:org/set:train@3/16")["revision"] is None
    for name in ("hf:set@v1", "hf:set:train@v1", "hf:@v1:train"):
        with pytest.raises(InputError, match=r"must read hf:NAME:SPLIT .* @REVISION after NAME"):
            check_name(name)


def test_parts_are_files_where_there_are_enough(tmp_path, capfd):
    files = parquet(tmp_path / "set", 4, 1, 7, 2, 3)
    assert isinstance(open_dataset(f"hf:{tmp_path}/set:train@1/5"), datasets.IterableDataset)
    for parts in (2, 3, 5):
        for part in range(parts):
            expected = [text for file in files[part::parts] for text in file]
            assert texts(f"hf:{tmp_path}/set:train@{part}/{parts}") == expected
    assert "fewer files" not in capfd.readouterr().err


def test_parts_are_row_groups_then_rows_where_there_are_fewer_files(tmp_path, capfd):
    files = parquet(tmp_path / "set", 10, 4, group=3)
    groups = [file[start : start + 3] for file in files for start in range(0, len(file), 3)]
    assert len(groups) == 6
    for parts in (3, 6):
        for part in range(parts):
            expected = [text for group in groups[part::parts] for text in group]
            assert texts(f"hf:{tmp_path}/set:train@{part}/{parts}") == expected
    assert "fewer files" not in capfd.readouterr().err
    found = [texts(f"hf:{tmp_path}/set:train@{part}/7") for part in range(7)]
    assert found == [list(chain(*files))[part::7] for part in range(7)]
    name = f"hf:{tmp_path}/set:train@6/7"
    line = f"{name}: has fewer files and row groups than parts: all rows are read to keep a part of them"
    assert capfd.readouterr().err.count(line) == 1


@pytest.fixture
def small_chunks(monkeypatch):
    """`datasets` takes the types of JSON from the first 16 KiB instead of 10 MiB."""
    original = datasets.load_dataset_builder
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *names: original(*names, chunksize=1 << 14))


def write_json(folder, rows):
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"hf:{folder}:train"


@pytest.mark.parametrize(
    ("early", "late"),
    [
        ({"score": None}, {"score": 3}),
        ({}, {"score": 3}),
        ({"score": 1}, {"score": 3.5}),
        ({"id": 7}, {"id": "a7"}),
        ({"tags": []}, {"tags": [1, 2]}),
        ({"meta": {"a": 1}}, {"meta": {"a": 1, "b": 2}}),
        ({"day": "2020-01-01"}, {"day": "unknown"}),
    ],
)
def test_json_whose_types_change_late(tmp_path, small_chunks, early, late):
    """Every row is what its own line says."""
    rows = [{"text": f"{number} " + "the cat sat " * 10, **early} for number in range(200)] + [{"text": "last", **late}]
    name = write_json(tmp_path / "set", rows)
    assert list(read_rows(name)) == rows
    assert [list(read_rows(f"{name}@{part}/2")) for part in range(2)] == [rows[::2], rows[1::2]]


def test_imported_json_whose_first_numbers_come_late(tmp_path, small_chunks, vocab_file):
    """Text without a parse first: its lists of relations are empty, and rows that have none are left out."""
    ids = [2, 5, 6, 7, 8, 5, 6, 3]
    plain = {"input_ids": ids, "heads": [-1] * 8, "relns": [-1] * 8}
    parsed = {"input_ids": ids, "heads": [-1, 2, *[-1] * 6], "relns": [-1, 0, *[-1] * 6]}
    empty = {"input_ids": ids, "heads": [], "relns": []}
    name = write_json(tmp_path / "set", [empty] * 400 + [plain, parsed, {"input_ids": ids, "heads": [-1] * 8}])
    header = import_dataset(name, str(vocab_file), str(tmp_path / "out"), seq_length=8)
    assert {key: header["counts"][key] for key in ("rows", "rows_left_out", "sequences", "edges")} == {
        "rows": 403,
        "rows_left_out": 401,
        "sequences": 2,
        "edges": 1,
    }


@pytest.mark.parametrize("form", ["array", "several lines"])
def test_json_that_is_not_lines(tmp_path, form):
    rows = [{"text": "one", "id": 1}, {"text": "two", "id": 2}]
    (tmp_path / "set").mkdir()
    text = json.dumps(rows) if form == "array" else "\n".join(json.dumps(row, indent=1) for row in rows)
    (tmp_path / "set" / "train.json").write_text(text)
    assert list(read_rows(f"hf:{tmp_path}/set:train")) == rows


def test_lines_of_json_that_are_broken(tmp_path):
    (tmp_path / "set").mkdir()
    path = tmp_path / "set" / "train.jsonl"
    for broken in ('{"text": ', '["text"]'):
        path.write_text('\ufeff{"text": "one\u2028a\u0085b"}\n\n{"text": "two"}\n' + broken + "\n", "utf-8")
        rows = read_rows(f"hf:{tmp_path}/set:train")
        assert [next(rows)["text"], next(rows)["text"]] == ["one\u2028a\x85b", "two"]
        with pytest.raises(InputError, match=r"set:train: fails after row 2 \(.*\); correct it$"):
            next(rows)


def test_every_pass_begins_at_the_beginning(tmp_path):
    """Also after one that was given up: no state of `datasets` is kept, which it would ignore in later epochs."""
    files = parquet(tmp_path / "set", 3, 2)
    write_json(tmp_path / "lines", [{"text": text} for text in chain(*files)])
    for folder in ("set", "lines"):
        given_up = read_rows(f"hf:{tmp_path / folder}:train")
        next(given_up)
        for _ in range(2):
            assert texts(f"hf:{tmp_path / folder}:train") == list(chain(*files))
        assert [row["text"] for row in given_up] == list(chain(*files))[1:]


def test_version_of_a_folder(tmp_path):
    """That of the split's files, whatever the folder is called and whenever they were written."""
    parquet(tmp_path / "set", 4, 3)
    name = f"hf:{tmp_path}/set:train"
    version = dataset_version(name)
    assert version["size"] == sum(path.stat().st_size for path in (tmp_path / "set").iterdir())
    assert dataset_version(f"{name}@1/2") == version  # parts made by several jobs can be compared
    shutil.copytree(tmp_path / "set", tmp_path / "copy")
    shutil.copy(tmp_path / "set" / "train-00000-of-00002.parquet", tmp_path / "copy" / "test.parquet")
    assert dataset_version(f"hf:{tmp_path}/copy:train") == version != dataset_version(f"hf:{tmp_path}/copy:test")
    assert dataset_version(f"hf:{tmp_path}/copy:train+test") != version
    assert dataset_version(f"hf:{tmp_path}/copy:all") != version
    path = tmp_path / "set" / "train-00001-of-00002.parquet"
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)
    assert dataset_version(name)["size"] == version["size"] and dataset_version(name) != version
    with pytest.raises(InputError, match=r"Bad split: validation. Available splits: \['train'\]"):
        dataset_version(f"hf:{tmp_path}/set:validation")
    with pytest.raises(InputError, match=r"set is a folder and has no revisions; leave out @main"):
        dataset_version(f"hf:{tmp_path}/set@main:train")


def test_version_of_a_saved_dataset(tmp_path):
    for name, rows in (("one", ["a", "b"]), ("same", ["a", "b"]), ("other", ["a", "c"])):
        datasets.Dataset.from_dict({"text": rows}).save_to_disk(tmp_path / name)
    one, same, other = (dataset_version(f"hf:{tmp_path}/{name}:train") for name in ("one", "same", "other"))
    assert one == same != other and set(one) == {"size", "sha256"}


def test_split_of_a_saved_dataset(tmp_path):
    """The rows of another split are not what was asked for."""
    parquet(tmp_path / "set", 4)
    whole = datasets.load_dataset(str(tmp_path / "set"), split="train")
    share = datasets.load_dataset(str(tmp_path / "set"), split="train[:50%]")
    whole.save_to_disk(tmp_path / "whole")
    share.save_to_disk(tmp_path / "share")
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "unknown")
    datasets.DatasetDict({"validation": share}).save_to_disk(tmp_path / "dict")
    for name, rows in (("whole:train", 4), ("share:train", 2), ("unknown:validation", 1), ("dict:validation", 2)):
        assert len(texts(f"hf:{tmp_path}/{name}")) == rows
    for name in ("whole", "share"):
        with pytest.raises(InputError, match=rf"saved in .*/{name} is the split train, not validation$"):
            open_dataset(f"hf:{tmp_path}/{name}:validation")
    with pytest.raises(InputError, match="cannot be opened"):
        open_dataset(f"hf:{tmp_path}/dict:train")


def test_one_commit_as_long_as_a_process_runs(tmp_path, fake_hub):
    (old,), (new,) = parquet(tmp_path / OLD, 3), parquet(tmp_path / NEW, 4)
    fake_hub |= {None: OLD, "v2": NEW}
    assert dataset_version("hf:org/set:train") == {"revision": OLD}
    fake_hub[None] = NEW
    assert texts("hf:org/set:train") == old and dataset_version("hf:org/set:train@0/2") == {"revision": OLD}
    assert dataset_version("hf:org/set@v2:train") == {"revision": NEW} and texts("hf:org/set@v2:train") == new


def test_shards_of_two_commits(tmp_path, fake_hub, vocab_file):
    """An output of another commit is not done, and parts of two commits are not merged."""
    parquet(tmp_path / OLD, 30, 40)
    parquet(tmp_path / NEW, 30, 40)
    fake_hub[None] = OLD
    inputs = [f"hf:org/set:train@{part}/2" for part in range(2)]
    settings = PreprocessSettings(inputs, str(vocab_file), "none", str(tmp_path / "out"), seq_length=8)
    (first,) = preprocess_shards(settings, (0, 2), log=lambda _: None)
    assert first["input_files"] == [{"name": inputs[0], "revision": OLD}]
    fake_hub[None] = NEW
    preprocess_shards(settings, (0, 2), log=lambda _: None)  # the same process
    hub._hub_builder.cache_clear()
    with pytest.raises(InputError, match="was made with other values of input_files"):
        preprocess_shards(settings, (0, 2), log=lambda _: None)
    preprocess_shards(settings, (1, 2), log=lambda _: None)
    prefixes = [str(tmp_path / "out" / f"org-set-train-{part}-2") for part in range(2)]
    with pytest.raises(InputError, match=rf"train-1-2: .*of hf:org/set:train \(revision {NEW}\) than .*{OLD}"):
        merge(prefixes, str(tmp_path / "all"))
    settings.overwrite = True
    preprocess_shards(settings, (0, 2), log=lambda _: None)
    files = [{"name": name, "revision": NEW} for name in inputs]
    assert merge(prefixes, str(tmp_path / "all"))["input_files"] == files


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """No network, and `org/set` in the cache of `datasets`, as it was at commit OLD; its rows."""
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    files = parquet(tmp_path / "set", 3, 3)
    builder = datasets.load_dataset_builder(str(tmp_path / "set"), cache_dir=str(tmp_path / "cache"))
    builder.download_and_prepare()
    shutil.copytree(builder.cache_dir, tmp_path / "cache" / "org___set" / "default" / "0.0.0" / OLD)
    hub._hub_builder.cache_clear()
    yield list(chain(*files))
    hub._hub_builder.cache_clear()


def test_without_a_network(tmp_path, offline):
    """The cache says which commit it holds; its files are others than the hub's, and so are parts of it."""
    for name in ("hf:org/set:train", f"hf:org/set@{OLD}:train"):
        assert texts(name) == offline
        version = dataset_version(name)
        assert version["revision"] == OLD and set(version) == {"revision", "size", "sha256"}
    assert texts(f"hf:{tmp_path}/set:train") == offline
    with pytest.raises(InputError, match=rf"cannot be reached, and the cache of datasets has revision {OLD}; name"):
        open_dataset("hf:org/set@v2:train")
    for call in (open_dataset, dataset_version):
        with pytest.raises(InputError, match=r"nothing:train: cannot be opened \(.*\); without a network give a") as e:
            call("hf:org/nothing:train")
        assert "\n" not in str(e.value)


def test_a_survey_of_another_version(tmp_path):
    """With as many documents."""
    (tmp_path / "set").mkdir()
    name = f"hf:{tmp_path}/set:train"
    path = tmp_path / "survey.json"

    def write(*words):
        (tmp_path / "set" / "train.jsonl").write_text("".join(json.dumps({"text": word}) + "\n" for word in words))

    write("one", "two", "one")
    path.write_text(json.dumps(survey(SurveySettings([name]))))
    assert Exclusions.read(str(path), [name], input_files([name])).excluded == {name: frozenset({2})}
    write("one", "two", "six")
    with pytest.raises(InputError, match=r"is not the hf:.* that was surveyed .* \(SHA-256 or revision differ\)"):
        Exclusions.read(str(path), [name], input_files([name]))


def test_imported_data_says_its_version(tmp_path, fake_hub, vocab_file):
    (tmp_path / NEW).mkdir()
    row = {"input_ids": [2, 5, 6, 7, 8, 5, 6, 3], "heads": [-1, 2, *[-1] * 6], "relns": [-1, 0, *[-1] * 6]}
    (tmp_path / NEW / "train.jsonl").write_text(json.dumps(row) + "\n")
    fake_hub[None] = NEW
    header = import_dataset("hf:org/set:train", str(vocab_file), str(tmp_path / "out"), seq_length=8)
    assert header["input_files"] == [{"name": "hf:org/set:train", "revision": NEW}]
