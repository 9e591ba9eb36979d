"""Checkpoints that are damaged, incomplete or cannot be written."""

from __future__ import annotations

import json
import shutil

import pytest
from engine_runs import checkpoint, largest_difference, records, train, weights

from megatron_sas.cli import InputError
from megatron_sas.engine import checkpoint as checkpoint_module
from megatron_sas.engine.checkpoint import newest_checkpoint
from megatron_sas.model import load_model


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """A run of 4 updates with checkpoints 0, 2 and 4."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(config, run, {"train.steps": 4, "checkpoint.every": 2})
    return run


@pytest.fixture
def run(whole, tmp_path):
    """A copy that may be damaged."""
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove(path):
    path.unlink()


FILES = ("model.safetensors", "optimizer-00000-of-00001.safetensors", "state.json", "tokenizer/tokenizer.json")


@pytest.mark.parametrize(("damage", "reason"), [(truncate, "bytes, not"), (flip, "SHA-256"), (remove, "is missing")])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_passed_over_aloud(run, damage, reason, name):
    damage(checkpoint(run, 4) / name)
    said = []
    assert newest_checkpoint(run, said.append) == checkpoint(run, 2)
    (line,) = said
    assert line.startswith("checkpoint step_00000004 is passed over: ")
    assert name in line
    assert reason in line


def test_a_checkpoint_without_its_manifest_or_from_the_future_is_passed_over(run):
    said = []
    manifest = checkpoint(run, 4) / "manifest.json"
    values = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(values | {"version": 2}))
    assert newest_checkpoint(run, said.append) == checkpoint(run, 2)
    assert "version 2" in said.pop()
    manifest.write_text("{")
    assert newest_checkpoint(run, said.append) == checkpoint(run, 2)
    assert "is damaged" in said.pop()
    manifest.unlink()
    assert newest_checkpoint(run, said.append) == checkpoint(run, 2)
    assert "never finished" in said.pop()


def test_the_pointer_is_a_hint(run):
    pointer = run / "checkpoints" / "latest"
    pointer.write_text("step_00000002\n")  # e.g. killed between the two renames
    assert newest_checkpoint(run, pytest.fail) == checkpoint(run, 2)
    for content in ("", "nonsense", "../../elsewhere"):
        pointer.write_text(content)
        assert newest_checkpoint(run, pytest.fail) == checkpoint(run, 4)
    pointer.unlink()
    assert newest_checkpoint(run, pytest.fail) == checkpoint(run, 4)


def test_a_run_goes_on_from_the_checkpoint_before_the_damaged_one(config, whole, run, capsys):
    flip(checkpoint(run, 4) / "model.safetensors")
    with pytest.raises(InputError, match="SHA-256"):
        load_model(run)
    train(config, run, {"train.steps": 4, "checkpoint.every": 2})
    assert "checkpoint step_00000004 is passed over" in capsys.readouterr().out
    assert largest_difference(weights(run, 4), weights(whole, 4)) == 0.0
    assert records(run) == records(whole)


def test_nothing_whole_is_an_error(config, run):
    for step in (0, 2, 4):
        truncate(checkpoint(run, step) / "model.safetensors")
    with pytest.raises(InputError, match="none of the 3 checkpoints is whole"):
        train(config, run, {"train.steps": 4, "checkpoint.every": 2})


def test_a_run_without_checkpoints_starts_anew(config, whole, tmp_path):
    assert newest_checkpoint(tmp_path, pytest.fail) is None
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(whole / "config.yaml", run)  # killed before step 0 was saved
    shutil.copy(whole / "metrics.jsonl", run)
    train(config, run, {"train.steps": 4, "checkpoint.every": 2})
    assert records(run) == records(whole)


def test_a_full_disk_leaves_the_last_checkpoint_and_nothing_partial(config, tmp_path, monkeypatch):
    run, write, calls = tmp_path / "run", checkpoint_module.write_weights, []

    def fail_at_the_second_checkpoint(path, tensors):
        calls.append(path)
        write(path, tensors)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module, "write_weights", fail_at_the_second_checkpoint)
    with pytest.raises(OSError, match=r"step_00000002: could not be written \(rank 0: .*No space left"):
        train(config, run, {"train.steps": 4, "checkpoint.every": 2})
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", "step_00000000"]
    monkeypatch.undo()
    train(config, run, {"train.steps": 4, "checkpoint.every": 2})
    assert sorted(records(run)) == [1, 2, 3, 4]


def test_files_of_a_checkpoint_obey_the_umask(whole):
    modes = {path.stat().st_mode & 0o777 for path in checkpoint(whole, 4).rglob("*") if path.is_file()}
    assert len(modes) == 1


def test_a_checkpoint_without_another_hosts_shard_is_not_published(run, monkeypatch):
    """As when every host has an output_dir of its own: rank 0 does not see what rank 1 has written."""
    monkeypatch.setattr(checkpoint_module.distributed, "world_size", lambda: 2)
    partial = checkpoint_module.partial_directory(run, 5)
    shutil.copytree(checkpoint(run, 4), partial)
    (partial / FILES[1]).rename(partial / "optimizer-00000-of-00002.safetensors")
    with pytest.raises(OSError, match=r"optimizer-00001-of-00002.safetensors is not there: run.output_dir must be one"):
        checkpoint_module.publish(run, 5)
    assert newest_checkpoint(run, pytest.fail) == checkpoint(run, 4)


def test_a_checkpoint_that_was_published_without_a_shard_is_passed_over(run):
    path = checkpoint(run, 4)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / FILES[1]).rename(path / "optimizer-00000-of-00002.safetensors")
    manifest["files"]["optimizer-00000-of-00002.safetensors"] = manifest["files"].pop(FILES[1])
    (path / "manifest.json").write_text(json.dumps(manifest))
    said = []
    assert newest_checkpoint(run, said.append) == checkpoint(run, 2)
    assert "was published without optimizer-00001-of-00002.safetensors" in said.pop()
