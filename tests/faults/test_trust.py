"""What a checkpoint, a run directory or a model from somebody else cannot do: run code, or write elsewhere."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from engine_runs import checkpoint, train

from megatron_sas.config import load_config
from megatron_sas.core.cli import InputError
from megatron_sas.core.files import sha256_file
from megatron_sas.export.hf import to_hf
from megatron_sas.run.checkpoint import newest_checkpoint
from megatron_sas.run.reading import load_model

SOURCES = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    train(config, run, {"snapshots.every": 3})
    return run


@pytest.fixture
def place(whole, tmp_path):
    """A directory with a run in it and, beside the run, something of value that must not change."""
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("…")
    return tmp_path


def contents(place):
    """Everything outside of the run."""
    return {
        path.relative_to(place): path.read_bytes() if path.is_file() else None
        for path in place.rglob("*")
        if place / "run" not in (path, *path.parents)
    }


def rewrite_manifest(directory, change):
    """Change a manifest as somebody would who knows the format: its entries stay consistent."""
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    for name, entry in manifest["files"].items():
        if (directory / name).is_file():
            entry.update(size=(directory / name).stat().st_size, sha256=sha256_file(directory / name))
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["../../../thesis/thesis.tex", "{place}/thesis/thesis.tex", "tokenizer/../../latest"])
def test_a_manifest_cannot_name_files_outside_of_its_directory(place, name):
    name = name.format(place=place)
    rewrite_manifest(checkpoint(place / "run", 6), lambda m: m["files"].update({name: {}}))
    said = []
    assert newest_checkpoint(place / "run", said.append) == checkpoint(place / "run", 3)
    assert f"names {name!r}, a file outside of its directory" in said[0]
    with pytest.raises(InputError, match="a file outside of its directory"):
        load_model(checkpoint(place / "run", 6))


@pytest.mark.parametrize("pointer", ["../../thesis", "/etc", "..", ".", "step_00000006/../../../thesis", "\0"])
def test_the_pointer_leads_nowhere_else(config, place, pointer):
    (place / "run" / "checkpoints" / "latest").write_text(pointer + "\n")
    assert newest_checkpoint(place / "run", pytest.fail) == checkpoint(place / "run", 6)
    with pytest.raises(InputError):
        load_model(place / "run")
    before = contents(place)
    train(config, place / "run", {"train.steps": 7})
    assert contents(place) == before


def test_checkpoints_that_are_links_are_not_followed_when_they_are_removed(config, place):
    """Old ones, half-written ones, and one that is written anew."""
    checkpoints = place / "run" / "checkpoints"
    for name in ("step_00000001", ".step_00000002.tmp", ".step_00000004.old", "step_00000005", ".step_00000005.old"):
        (checkpoints / name).symlink_to(place / "thesis")
    before = contents(place)
    train(config, place / "run", {"train.steps": 7, "checkpoint.every": 1, "checkpoint.keep_last": 1})
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step_00000007"]
    assert contents(place) == before


def test_snapshots_and_marks_replace_links_instead_of_following_them(config, place):
    run = place / "run"
    shutil.rmtree(run / "snapshots" / "step_00000006")
    (run / "snapshots" / "step_00000006").symlink_to(place / "thesis")
    (run / "requeue").symlink_to(place / "thesis" / "thesis.tex")
    (run / "checkpoints" / "latest").unlink()
    (run / "checkpoints" / "latest").symlink_to(place / "thesis" / "thesis.tex")
    shutil.rmtree(checkpoint(run, 6))
    before = contents(place)
    train(config, run, {"snapshots.every": 3})
    assert contents(place) == before
    assert not (run / "snapshots" / "step_00000006").is_symlink()
    assert not os.path.lexists(run / "requeue")


@pytest.mark.parametrize("step", ["../../thesis", 10**6, -1, None, "6"])
def test_a_step_that_does_not_fit_is_refused(config, place, step):
    """The step names the directories that come after it."""
    directory = checkpoint(place / "run", 6)
    state = json.loads((directory / "state.json").read_text())
    (directory / "state.json").write_text(json.dumps(state | {"step": step}))
    rewrite_manifest(directory, lambda m: None)
    before = contents(place)
    with pytest.raises(InputError, match=r"state\.json: is of step .*; use another checkpoint"):
        train(config, place / "run", {"train.steps": 7})
    assert contents(place) == before


def test_what_a_checkpoint_says_of_its_run_is_not_where_one_writes(config, place):
    """A copied run whose files name another directory."""
    run, other = place / "run", place / "other"
    for path in (run / "config.yaml", checkpoint(run, 6) / "config.yaml"):
        path.write_text(path.read_text().replace("output_dir: ", f"output_dir: {other} # "))
    rewrite_manifest(checkpoint(run, 6), lambda m: None)
    before = contents(place)
    train(config, run, {"train.steps": 7})
    assert contents(place) == before
    assert str(run) in (run / "config.yaml").read_text()


class Bomb:
    """Unpickling it makes a directory."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickled_weights_are_data_only(place):
    to_hf(place / "run", place / "hf")
    (place / "hf" / "model.safetensors").unlink()
    torch.save({"bert.embeddings.word_embeddings.weight": Bomb(place / "exploded")}, place / "hf" / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot be read"):
        load_model(place / "hf")
    (place / "hf" / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(place / "exploded")))
    with pytest.raises(InputError, match="cannot be read"):
        load_model(place / "hf")
    assert not (place / "exploded").exists()


def test_a_pickle_in_the_place_of_tensors_is_not_read(config, place):
    directory = checkpoint(place / "run", 6)
    for name in ("model.safetensors", "optimizer-00000-of-00001.safetensors"):
        (directory / name).write_bytes(pickle.dumps(Bomb(place / "exploded")))
        rewrite_manifest(directory, lambda m: None)
        with pytest.raises(InputError):
            train(config, place / "run", {"train.steps": 7})
        shutil.copy(checkpoint(place / "run", 3) / name, directory / name)
    assert not (place / "exploded").exists()


def test_a_tokenizer_cannot_bring_code(place):
    directory = checkpoint(place / "run", 6) / "tokenizer"
    (directory / "evil.py").write_text(f"import os\nos.mkdir({str(place / 'exploded')!r})\nclass T: pass\n")
    path = directory / "tokenizer_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}}))
    rewrite_manifest(directory.parent, lambda m: m["files"].update({"tokenizer/evil.py": {}}))
    load_model(checkpoint(place / "run", 6))
    assert not (place / "exploded").exists()


def test_yaml_cannot_bring_code(config, place):
    evil = place / "evil.yaml"
    evil.write_text(config.read_text() + f"logging: !!python/object/apply:os.mkdir ['{place / 'exploded'}']\n")
    with pytest.raises(InputError):
        load_config(evil)
    (place / "run" / "config.yaml").write_text(evil.read_text())
    with pytest.raises(InputError):
        train(config, place / "run", {"train.steps": 7})
    assert not (place / "exploded").exists()


def test_no_module_reads_pickles_or_remote_code():
    """`torch.load` only with weights_only, and nothing else that runs what it reads."""
    running = re.compile(r"pickle\.load|trust_remote_code=True|unsafe_load|full_load|(?<![.\w])(eval|exec)\(")
    files = [*(SOURCES / "megatron_sas").rglob("*.py"), *(SOURCES / "tools").glob("*.py"), SOURCES / "pretrain_mlm.py"]
    assert len(files) > 50
    for path in files:
        for line in path.read_text().splitlines():
            assert "torch.load(" not in line or "weights_only=True" in line, f"{path}: {line}"
            assert not running.search(line), f"{path}: {line}"
