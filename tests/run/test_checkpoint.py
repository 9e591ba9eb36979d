"""Checkpoints that are damaged, incomplete or cannot be written."""

from __future__ import annotations

import errno
import json
import shutil

import pytest
from engine_runs import checkpoint, largest_difference, records, train, weights

from megatron_sas.config import load_config
from megatron_sas.core.cli import InputError
from megatron_sas.run.checkpoint import newest_checkpoint, partial_directory, publish, write_slice
from megatron_sas.run.directory import RunDirectory
from megatron_sas.run.reading import load_model
from megatron_sas.run.records import lines_until
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


@pytest.mark.parametrize("error", [InputError("x: cannot be read"), OSError(errno.EIO, "Input/output error", "x")])
def test_a_checkpoint_that_cannot_be_read_is_passed_over_aloud(run, error):
    """A shard that a bad disk does not give (tests/core/test_files.py), or its manifest."""

    def verify(path):
        if path == checkpoint(run, 4):
            raise error

    lines = []
    assert newest_checkpoint(run, lines.append, verify) == checkpoint(run, 2)
    assert lines == [f"checkpoint step_00000004 is passed over: {error}"]


def test_a_directory_that_cannot_be_read_is_not_an_empty_one(config, run):
    """The run would begin again, over its records. What cannot be listed here is no directory: root may read all."""
    before = (run / "metrics.jsonl").read_bytes()
    (run / "checkpoints").rename(run / "elsewhere")
    (run / "checkpoints").touch()
    with pytest.raises(InputError, match=r"Not a directory: '.*checkpoints'"):
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


def test_what_an_attempt_before_the_last_recorded_proves_nothing(config, whole, tmp_path):
    """Twice killed before its first save, the second time with a denser schedule, before it had records of its own."""
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(whole / "metrics.jsonl", run)
    cut_records(run, 3)
    text = (whole / "config.yaml").read_text()
    assert "every: 2" in text
    (run / "config.yaml").write_text(text.replace("every: 2", "every: 4", 1))

    def die():  # which is first asked for the time between the configuration and the records
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, run, {"train.steps": 4, "checkpoint.every": 1}, clock=die)
    assert "every: 1" in (run / "config.yaml").read_text()
    train(config, run, {"train.steps": 4, "checkpoint.every": 1})
    assert records(run) == records(whole)


def test_a_full_disk_leaves_the_last_checkpoint_and_nothing_partial(config, tmp_path):
    run = tmp_path / "run"

    def fail_at_the_second_checkpoint(directory, part):
        write_slice(directory, part)
        if directory.name.startswith(".step_00000002."):
            (directory / FILES[1]).unlink()
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"step_00000002: could not be written \(rank 0: .*No space left"):
        train(config, run, {"train.steps": 4, "checkpoint.every": 2}, write=fail_at_the_second_checkpoint)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", "step_00000000"]
    train(config, run, {"train.steps": 4, "checkpoint.every": 2})
    assert sorted(records(run)) == [1, 2, 3, 4]


def test_files_of_a_checkpoint_obey_the_umask(whole):
    modes = {path.stat().st_mode & 0o777 for path in checkpoint(whole, 4).rglob("*") if path.is_file()}
    assert len(modes) == 1


def test_a_checkpoint_without_another_hosts_shard_is_not_published(run):
    """As when every host has its own output_dir: rank 0 does not see what rank 1 has written."""
    partial = partial_directory(RunDirectory(run), 5, "token")
    shutil.copytree(checkpoint(run, 4), partial)
    (partial / FILES[1]).rename(partial / "optimizer-00000-of-00002.safetensors")
    with pytest.raises(OSError, match=r"optimizer-00001-of-00002.safetensors is not there: run.output_dir must be one"):
        publish(partial, 5, world_size=2)
    assert newest_checkpoint(run, pytest.fail) == checkpoint(run, 4)


@pytest.mark.parametrize("step", [0, 5])
def test_a_checkpoint_with_a_shard_of_nobody_is_not_published(run, step):
    partial = partial_directory(RunDirectory(run), step, "token")
    shutil.copytree(checkpoint(run, min(step, 4)), partial)
    (partial / "optimizer-00001-of-00002.safetensors").touch()
    with pytest.raises(OSError, match=r"optimizer-00001-of-00002.safetensors is another program's"):
        publish(partial, step, world_size=1)


def test_an_orphan_of_an_earlier_start_cannot_spoil_a_checkpoint(config, tmp_path):
    """Rank 1 of a job of two whose rank 0 was killed: its thread still writes, where it was told to."""
    run, begun, stale = tmp_path / "run", {}, {}

    def write_and_note(directory, part):
        write_slice(directory, part)
        begun[directory.parent / directory.name[:14]] = directory
        if orphaned := stale.get(directory.parent / directory.name[:14]):
            orphaned.mkdir(exist_ok=True)
            (orphaned / "optimizer-00001-of-00002.safetensors").write_bytes(b"of another start")

    overrides = {"train.steps": 4, "checkpoint.every": 2}
    train(config, run, overrides, write=write_and_note)
    shutil.rmtree(checkpoint(run, 4))
    stale.update(begun)
    train(config, run, overrides, write=write_and_note)
    assert newest_checkpoint(run, pytest.fail) == checkpoint(run, 4)
    assert [path.name for path in checkpoint(run, 4).glob("optimizer-*")] == [FILES[1]]
    train(config, run, overrides)
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
def test_what_is_not_finite_is_not_published(config, tmp_path, part, value):
    """Else it would be the newest checkpoint, and `keep_last` would remove the good ones."""
    run, trainers = tmp_path / "run", []

    def damage(step, values):
        if step == 3:  # the update is done, its checkpoint not yet begun
            engine = trainers[0].engine
            (name, _), *_ = engine.named_parameters()
            tensors = dict(engine.full_tensors(None if part == "weights" else "exp_avg"))
            tensors[name].view(-1)[5] = float(value)
            if part == "weights":
                engine.bert.load_state_dict(tensors)
            else:
                engine.load_moments(lambda key, name: tensors[name].abs(), 3)

    with pytest.raises(OSError, match=r"step_00000003: could not be written \(rank 0: .* is not finite; the newest"):
        overrides = {"checkpoint.every": 1, "checkpoint.keep_last": 1}
        train(config, run, overrides, prepare=trainers.append, observer=damage)
    assert newest_checkpoint(run, pytest.fail) == checkpoint(run, 2)
    assert all(bool(tensor.isfinite().all()) for tensor in weights(run, 2).values())
