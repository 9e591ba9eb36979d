"""Checkpoints that are damaged, incomplete or cannot be written."""

from __future__ import annotations

import errno
import json
import os
import shutil

import pytest
from engine_runs import checkpoint, largest_difference, records, train, weights

from megatron_sas.config import load_config
from megatron_sas.core import manifest as manifest_module
from megatron_sas.core.cli import InputError
from megatron_sas.run import checkpoint as checkpoint_module
from megatron_sas.run import saver as saving
from megatron_sas.run.checkpoint import newest_checkpoint
from megatron_sas.run.directory import RunDirectory
from megatron_sas.run.reading import load_model
from megatron_sas.run.records import lines_until
from megatron_sas.train import build
from megatron_sas.train.build import build_state


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


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_checkpoint_that_cannot_be_read_is_passed_over_aloud(run, monkeypatch, code):
    """A bad disk or a stale handle: the file's size is known, its content is not to be had."""
    sha256_file = manifest_module.sha256_file

    def fail_for_a_shard(path):
        if path == checkpoint(run, 4) / FILES[1]:
            raise OSError(code, os.strerror(code))
        return sha256_file(path)

    monkeypatch.setattr(manifest_module, "sha256_file", fail_for_a_shard)
    said = []
    assert newest_checkpoint(run, said.append) == checkpoint(run, 2)
    path = checkpoint(run, 4) / FILES[1]
    reason = f"{path}: cannot be read ({os.strerror(code)}); use another checkpoint"
    assert said == [f"checkpoint step_00000004 is passed over: {reason}"]


def test_a_manifest_that_cannot_be_read_is_no_end_either(run, monkeypatch):
    verify = checkpoint_module.verify_checkpoint

    def fail(path):
        if path == checkpoint(run, 4):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path / "manifest.json"))
        verify(path)

    monkeypatch.setattr(checkpoint_module, "verify_checkpoint", fail)
    said = []
    assert newest_checkpoint(run, said.append) == checkpoint(run, 2)
    assert "Input/output error" in said[0] and "manifest.json" in said[0]


def test_a_directory_that_cannot_be_read_is_not_an_empty_one(config, run, monkeypatch):
    """The run would begin anew, over its records."""
    before = (run / "metrics.jsonl").read_bytes()

    def refuse(path, listdir=os.listdir):
        if path == run / "checkpoints":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuse)
    monkeypatch.setattr(os, "scandir", refuse)  # what glob reads
    with pytest.raises(InputError, match=r"Permission denied: '.*checkpoints'"):
        train(config, run, {"train.steps": 4, "checkpoint.every": 2})
    assert (run / "metrics.jsonl").read_bytes() == before


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
    shutil.copy(whole / "config.yaml", run)  # killed before step 0 was saved, for which the save of step 2 waits
    (run / "metrics.jsonl").write_bytes(lines_until(whole / "metrics.jsonl", 2))
    train(config, run, {"train.steps": 4, "checkpoint.every": 2})
    assert records(run) == records(whole)


def cut_records(run, step, *events):
    """The records up to `step` as a kill leaves them, and these events, (step, name)."""
    lines = [json.dumps({"kind": "event", "step": at, "event": event}) for at, event in events]
    (run / "metrics.jsonl").write_bytes(lines_until(run / "metrics.jsonl", step) + "\n".join([*lines, ""]).encode())


@pytest.mark.parametrize("overrides", [{}, {"train.learning_rate": 0.5}, {"checkpoint.every": 3}])
@pytest.mark.parametrize("step", [3, 4])
def test_a_run_that_has_lost_its_checkpoints_is_not_begun_anew(config, run, overrides, step):
    """Somebody needed the space, or a scratch disk was purged: the records and snapshots must not go as well."""
    shutil.rmtree(run / "checkpoints")
    (run / "snapshots" / "step_00000002").mkdir(parents=True)
    cut_records(run, step)
    before = {path: path.read_bytes() for path in run.rglob("*.*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(InputError) as error:
        train(config, run, {"train.steps": 4, "checkpoint.every": 2, **overrides})
    assert str(error.value) == (
        f"{run / 'checkpoints'}: holds no checkpoint, but the run's records reach update {step}; restore the newest, "
        f"choose another run.output_dir, or remove {run} to begin anew"
    )
    assert before == {path: path.read_bytes() for path in before}


@pytest.mark.parametrize(
    ("events", "proof"),
    [
        ([], False),
        ([(0, "stopped")], False),  # before its first save
        ([(1, "stopped")], True),
        ([(1, "start")], True),
        ([(2, "finished")], True),
        ([(1, "skipped_update"), (1, "stopped")], False),  # while updates are skipped nothing is saved
    ],
)
def test_what_proves_that_there_was_a_checkpoint(config, run, events, proof):
    """Besides records beyond the second one due."""
    shutil.rmtree(run / "checkpoints")
    cut_records(run, 2, *events)
    settings = load_config(config, ["--train.steps=4", "--checkpoint.every=2", f"--run.output_dir={run}"])
    if proof:
        with pytest.raises(InputError, match="holds no checkpoint, but the run's records reach update"):
            build_state(settings, print)
    else:
        assert build_state(settings, print).checkpoint is None


def test_what_an_attempt_before_the_last_recorded_proves_nothing(config, whole, tmp_path, monkeypatch):
    """Twice killed before its first save, the second time with a denser schedule, before it had records of its own."""
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(whole / "metrics.jsonl", run)
    cut_records(run, 3)
    text = (whole / "config.yaml").read_text()
    assert "every: 2" in text
    (run / "config.yaml").write_text(text.replace("every: 2", "every: 4", 1))

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(build, "Records", die)
        train(config, run, {"train.steps": 4, "checkpoint.every": 1})
    train(config, run, {"train.steps": 4, "checkpoint.every": 1})
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
    partial = checkpoint_module.partial_directory(RunDirectory(run), 5, "token")
    shutil.copytree(checkpoint(run, 4), partial)
    (partial / FILES[1]).rename(partial / "optimizer-00000-of-00002.safetensors")
    with pytest.raises(OSError, match=r"optimizer-00001-of-00002.safetensors is not there: run.output_dir must be one"):
        checkpoint_module.publish(partial, 5)
    assert newest_checkpoint(run, pytest.fail) == checkpoint(run, 4)


@pytest.mark.parametrize("step", [0, 5])
def test_a_checkpoint_with_a_shard_of_nobody_is_not_published(run, step):
    partial = checkpoint_module.partial_directory(RunDirectory(run), step, "token")
    shutil.copytree(checkpoint(run, min(step, 4)), partial)
    (partial / "optimizer-00001-of-00002.safetensors").touch()
    with pytest.raises(OSError, match=r"optimizer-00001-of-00002.safetensors is another program's"):
        checkpoint_module.publish(partial, step)


def test_an_orphan_of_an_earlier_start_cannot_spoil_a_checkpoint(config, tmp_path, monkeypatch):
    """Rank 1 of a job of two whose rank 0 was killed: its thread still writes, where it was told to."""
    run, write, begun, stale = tmp_path / "run", saving.write_slice, {}, {}

    def write_and_note(directory, share):
        write(directory, share)
        begun[directory.parent / directory.name[:14]] = directory
        if orphaned := stale.get(directory.parent / directory.name[:14]):
            orphaned.mkdir(exist_ok=True)
            (orphaned / "optimizer-00001-of-00002.safetensors").write_bytes(b"of another start")

    monkeypatch.setattr(saving, "write_slice", write_and_note)
    train(config, run, {"train.steps": 4, "checkpoint.every": 2})
    shutil.rmtree(checkpoint(run, 4))
    stale.update(begun)
    train(config, run, {"train.steps": 4, "checkpoint.every": 2})
    assert newest_checkpoint(run, pytest.fail) == checkpoint(run, 4)
    assert [path.name for path in checkpoint(run, 4).glob("optimizer-*")] == [FILES[1]]
    train(config, run, {"train.steps": 4, "checkpoint.every": 2})
    assert not list((run / "checkpoints").glob(".*"))  # what the orphan left


def test_a_checkpoint_that_was_published_without_a_shard_is_passed_over(run):
    path = checkpoint(run, 4)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / FILES[1]).rename(path / "optimizer-00000-of-00002.safetensors")
    manifest["files"]["optimizer-00000-of-00002.safetensors"] = manifest["files"].pop(FILES[1])
    (path / "manifest.json").write_text(json.dumps(manifest))
    said = []
    assert newest_checkpoint(run, said.append) == checkpoint(run, 2)
    assert "was published without optimizer-00001-of-00002.safetensors" in said.pop()


@pytest.mark.parametrize(("part", "value"), [("weights", "inf"), ("weights", "nan"), ("moments", "-inf")])
def test_what_is_not_finite_is_not_published(config, tmp_path, monkeypatch, part, value):
    """Else it would be the newest checkpoint, and `keep_last` would remove the good ones."""

    def damage(*arguments, **options):
        share = gather(*arguments, **options)
        if arguments[1] == 3:
            next(iter(getattr(share, part).values())).view(-1)[5] = float(value)
        return share

    gather = saving.gather_slice
    monkeypatch.setattr(saving, "gather_slice", damage)
    run = tmp_path / "run"
    with pytest.raises(OSError, match=r"step_00000003: could not be written \(rank 0: .* is not finite; the newest"):
        train(config, run, {"checkpoint.every": 1, "checkpoint.keep_last": 1})
    assert newest_checkpoint(run, pytest.fail) == checkpoint(run, 2)
    assert all(bool(tensor.isfinite().all()) for tensor in weights(run, 2).values())
