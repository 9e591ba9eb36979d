"""Which data a run may begin with: nothing twice, nothing of validation, as far as the headers tell."""

from __future__ import annotations

import json
import lzma
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_sas.core.cli import InputError
from megatron_sas.corpus.build.merge import merge
from megatron_sas.corpus.build.preprocess import PreprocessSettings, preprocess
from megatron_sas.data.overlap import Documents, check_overlap
from megatron_sas.data.packed import PackedData

TRAIN = {"split": "train", "validation_share": 0.2}
VALIDATION = {"split": "validation", "validation_share": 0.2}


def documents(name):
    """Texts that differ from those of other names, as tokens too: most words are not in the vocabulary."""
    texts = (f"the {name} sat. {number} dogs run" for number in range(ord(name[0])))
    return "".join(json.dumps({"text": text, "other": "a cat"}) + "\n" for text in texts)


@pytest.fixture
def make(tmp_path, vocab_file):
    """Packed data of files of `tmp_path`, which are written if they are not there; `name` is that of the data."""

    def make(name, *inputs, **options):
        for path in (tmp_path / file for file in inputs):
            if not path.exists():
                path.write_text(documents(path.stem))
        paths = [str(tmp_path / file) for file in inputs]
        settings = PreprocessSettings(paths, str(vocab_file), "none", str(tmp_path / name), 8, overwrite=True)
        preprocess(replace(settings, **options))
        return PackedData(tmp_path / name)

    return make


def refusal(training, validation=None):
    with pytest.raises(InputError) as error:
        check_overlap(training, validation)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_validation_documents_in_training(make, tmp_path):
    """Made of the same file, and not as the two sides of one split."""
    whole, train, again = make("whole", "a.jsonl"), make("train", "a.jsonl", **TRAIN), make("again", "a.jsonl", **TRAIN)
    shares = {share: VALIDATION | {"validation_share": share} for share in (0.1, 0.2, 0.3)}
    fewer, validation, more = (make(f"share{share}", "a.jsonl", **options) for share, options in shares.items())
    other = make("other", "b.jsonl")
    for training, held_out in (([train], validation), ([train, other], validation), ([whole], other), ([train], fewer)):
        check_overlap(training, held_out)  # a larger share contains the smaller one
    assert refusal([other, train], more) == (
        f"data.validation: {more.prefix} and {train.prefix} of data.train hold the same documents of a.jsonl; take "
        "other text, or preprocess with --split train and --split validation, both with one --validation-share"
    )
    for training, held_out in ((whole, validation), (train, whole)):
        assert "hold the same documents of a.jsonl; take" in refusal([training], held_out)
    assert "hold the same sequences; take" in refusal([train], again)
    # The same content under another name, beside other inputs, and within merged data
    (tmp_path / "copy.jsonl").write_text((tmp_path / "a.jsonl").read_text())
    assert "hold the same documents of copy.jsonl" in refusal([make("copy", "c.jsonl", "copy.jsonl")], validation)
    merge([whole.prefix, other.prefix], str(tmp_path / "merged"))
    assert "hold the same documents of a.jsonl" in refusal([PackedData(tmp_path / "merged")], validation)


def test_what_is_not_certain_is_not_refused(make, tmp_path):
    field = make("field", "a.jsonl", text_field="other")  # another text of the same file
    check_overlap([make("whole", "a.jsonl")], field)
    for name in ("empty", "nothing"):  # archives of nothing are equal
        (tmp_path / f"{name}.jsonl.xz").write_bytes(lzma.compress(b""))
    check_overlap([make("train", "b.jsonl", "empty.jsonl.xz")], make("validation", "c.jsonl", "nothing.jsonl.xz"))
    header = {"inputs": ["hf:x:train"], "files": {}}  # data of earlier versions say no more
    assert Documents("a", header).shared_with(Documents("b", header)) is None


def test_datasets_and_headers_of_earlier_versions():
    def data(record, **settings):
        return Documents("a", {"input_files": record} | ({"settings": settings} if settings else {}))

    def hub(name, **version):
        return [{"name": name, **version}]

    train = data(hub("hf:x:train@0/2", revision="1"))
    assert train.shared_with(data(hub("hf:x:train@0/2", revision="1", size=99, sha256="2")))  # as the cache has it
    assert not train.shared_with(data(hub("hf:x:train@1/2", revision="1")))
    assert not train.shared_with(data(hub("hf:x:train@0/2", revision="2")))
    folder = data(hub("hf:y:train@0/2", size=99, sha256="3"))  # the SHA-256 is of all of its files
    assert not folder.shared_with(data(hub("hf:y:train@1/2", size=99, sha256="3")))
    assert folder.shared_with(data({"hf:y:train@0/2": {"size": 99, "sha256": "3"}}))

    rows = {"rows_per_document": 9, "text_field": "text"}
    one, two = data(hub("a", sha256="1"), **rows, **TRAIN), data(hub("a", sha256="1"), **rows, **VALIDATION)
    assert not one.shared_with(two)
    assert one.shared_with(data(hub("a", sha256="1"), **rows | {"rows_per_document": 8}, **VALIDATION))
    # Merged data of two shares: all of them must meet the others.
    parts = [{"settings": TRAIN | {"validation_share": share}} for share in (0.1, 0.4)]
    merged = Documents("m", {"input_files": hub("a", sha256="1"), "parts": parts})
    assert not merged.shared_with(data(hub("a", sha256="1"), **VALIDATION))
    assert merged.shared_with(data(hub("a", sha256="1"), **VALIDATION | {"validation_share": 0.5}))


def test_lists_of_training_data(make, tmp_path):
    a, b, validation = make("a", "a.jsonl", **TRAIN), make("b", "b.jsonl"), make("c", "c.jsonl", **VALIDATION)
    check_overlap([a, b], None)
    check_overlap([validation], None)
    check_overlap([validation, b], None)
    message = f"was made with --split validation, {a.prefix} with --split train; leave the first out"
    assert refusal([b, a, validation]) == f"data.train: {validation.prefix} {message}"
    assert refusal([a, b, a]) == f"data.train: {a.prefix} is given twice; leave one out"
    for suffix in ("bin", "idx", "heads.bin", "marks.bin", "relns.bin", "json"):
        Path(tmp_path, f"copy.{suffix}").symlink_to(f"{b.prefix}.{suffix}")
    copy = PackedData(tmp_path / "copy")
    assert refusal([a, b, copy]) == f"data.train: {b.prefix} and {copy.prefix} hold the same sequences; leave one out"
    merge([b.prefix, make("d", "d.jsonl").prefix], str(tmp_path / "bd"))
    merge([str(tmp_path / "bd"), make("e", "e.jsonl").prefix], str(tmp_path / "bde"))
    header = tmp_path / "bde.json"
    value = json.loads(header.read_text())
    header.write_text(json.dumps(value | {"input_files": []}))  # as of imported data in earlier versions
    assert "hold the same sequences" in refusal([b, PackedData(tmp_path / "bde")])
    whole = make("whole", "a.jsonl")
    assert "hold the same documents of a.jsonl; leave one out" in refusal([a, whole])
