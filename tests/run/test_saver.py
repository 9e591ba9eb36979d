"""Saving beside training: what is kept, what fails, what it costs; and snapshots."""

from __future__ import annotations

import threading

import pytest
import torch
from engine_runs import checkpoint, largest_difference, train, weights
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoTokenizer

from megatron_sas.config import load_config
from megatron_sas.core.cli import InputError
from megatron_sas.export.hf import to_hf
from megatron_sas.run.checkpoint import newest_checkpoint, remove_old_checkpoints, write_slice
from megatron_sas.run.directory import RunDirectory
from megatron_sas.run.reading import load_model
from megatron_sas.run.saver import CheckpointSection, Saver


def kept(run):
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step_*"))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({}, [0, 1, 2, 3, 4, 5, 6]),
        ({"checkpoint.keep_last": 1}, [6]),
        ({"checkpoint.keep_last": 2}, [5, 6]),
        ({"checkpoint.keep_last": 1, "checkpoint.keep_every": 3}, [0, 3, 6]),
    ],
)
def test_which_checkpoints_are_kept(config, tmp_path, overrides, expected):
    run = tmp_path / "run"
    train(config, run, {"checkpoint.every": 1, **overrides})
    assert kept(run) == expected
    assert sorted(path.name for path in (run / "checkpoints").glob(".*")) == []
    assert newest_checkpoint(run, pytest.fail) == checkpoint(run, 6)


def test_keep_every_needs_keep_last(config):
    with pytest.raises(InputError, match=r"checkpoint\.keep_every: needs keep_last"):
        load_config(config, ["--checkpoint.keep_every=3"])


@pytest.mark.parametrize(
    ("section", "seconds", "keeps"),
    [
        ({}, 600.0, 2),
        ({"minutes": 0}, None, 2),
        ({"keep_last": 5}, 600.0, 5),
        ({"keep_every": 1000}, 600.0, 2),
        ({"every": 3}, None, None),
        ({"dense_every": 3, "dense_until": 9}, None, None),
        ({"at": [3], "keep_last": 1}, None, 1),
        ({"every": 3, "minutes": 5, "keep_last": 4}, 300.0, 4),
    ],
)
def test_where_no_steps_are_named_a_checkpoint_is_due_every_ten_minutes_and_two_are_kept(section, seconds, keeps):
    found = CheckpointSection.model_validate(section)
    assert (found.seconds, found.kept) == (seconds, keeps)


def test_the_clock_needs_a_limit(config):
    with pytest.raises(InputError, match=r"checkpoint\.minutes: needs keep_last"):
        load_config(config, ["--checkpoint.minutes=10"])  # beside `every`


def test_the_only_valid_checkpoint_is_never_removed(config, tmp_path):
    """After a fall back, the newest by number are damaged: they are not what `keep_last` counts."""
    run = tmp_path / "run"
    train(config, run, {"checkpoint.every": 1})
    for step in (3, 4, 5, 6):
        (checkpoint(run, step) / "model.safetensors").write_bytes(b"")
    remove_old_checkpoints(RunDirectory(run), 2, keep_last=1, keep_every=None)  # as after 2 was published again
    assert kept(run) == [2, 3, 4, 5, 6]
    (run / "checkpoints" / "latest").write_text("step_00000002\n")
    train(config, run, {"checkpoint.every": 1, "checkpoint.keep_last": 2})
    assert kept(run) == [5, 6]


def test_leftovers_are_removed_and_named_when_a_run_starts(config, tmp_path, capsys):
    run = tmp_path / "run"
    train(config, run, {"train.steps": 3})
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "thesis.tex").write_text("…")
    (run / "checkpoints" / ".step_00000005.0123abcd.tmp").mkdir()
    (run / "checkpoints" / ".step_00000002.old").mkdir()
    (run / "checkpoints" / ".step_00000006.tmp").symlink_to(elsewhere)
    assert "half-written" not in capsys.readouterr().out
    train(config, run)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "half-written" in line]
    assert line.startswith("removed what was half-written: ") and "checkpoints/.step_00000005.0123abcd.tmp" in line
    assert list((run / "checkpoints").glob(".*")) == []
    assert (elsewhere / "thesis.tex").exists()


def test_training_goes_on_while_a_checkpoint_is_written(config, tmp_path):
    """The thread that writes step 2 waits for an update that comes after it."""
    updated, steps, threads = threading.Event(), [], set()

    def write_when_training_has_gone_on(directory, part):
        threads.add(threading.current_thread())
        if directory.name.startswith(".step_00000002."):
            assert updated.wait(20), "training waited for the checkpoint"
        write_slice(directory, part)

    def note(step, values):
        steps.append(step)
        if step == 3:
            updated.set()

    options = {"write": write_when_training_has_gone_on, "observer": note}
    train(config, tmp_path / "run", {"checkpoint.every": 2}, **options)
    assert steps == [1, 2, 3, 4, 5, 6]
    assert threading.main_thread() not in threads
    assert kept(tmp_path / "run") == [0, 2, 4, 6]
    # What was saved is step 2, though training had gone on.
    train(config, tmp_path / "short", {"train.steps": 2})
    assert largest_difference(weights(tmp_path / "run", 2), weights(tmp_path / "short", 2)) == 0.0


def test_an_error_of_the_thread_ends_the_run_soon(config, tmp_path):
    def fail(directory, part):
        if directory.name.startswith(".step_00000002."):
            raise OSError(28, "No space left on device")
        write_slice(directory, part)

    run, overrides = tmp_path / "run", {"train.steps": 90, "checkpoint.at": [2]}  # no later checkpoint would find out
    with pytest.raises(OSError, match=r"step_00000002: could not be written \(rank 0: .*No space left"):
        train(config, run, overrides, write=fail)
    assert kept(run) == [0]
    assert list((run / "checkpoints").glob(".*")) == []


SNAPSHOTS = {"snapshots.every": 3, "snapshots.at": [1], "checkpoint.every": 6}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_snapshots_are_models_for_everybody(config, tmp_path, dtype):
    run = tmp_path / "run"
    train(config, run, {**SNAPSHOTS, "snapshots.dtype": dtype})
    names = [f"step_{step:08d}" for step in (0, 1, 3, 6)]
    assert sorted(path.name for path in (run / "snapshots").iterdir()) == names
    assert kept(run) == [0, 6]
    snapshot, exported = run / "snapshots" / "step_00000006", tmp_path / "hf"
    to_hf(run, exported, dtype)
    assert {path.name for path in snapshot.iterdir()} | {"README.md"} == {path.name for path in exported.iterdir()}
    tensors, expected = load_file(snapshot / "model.safetensors"), load_file(exported / "model.safetensors")
    assert largest_difference(tensors, expected) == 0.0
    theirs = AutoModelForMaskedLM.from_pretrained(snapshot).eval()
    assert theirs.dtype == (torch.float32 if dtype == "fp32" else torch.bfloat16)
    assert len(AutoTokenizer.from_pretrained(snapshot)) == 65
    ours, _ = load_model(snapshot)  # what the tools do with --model
    ids = torch.randint(65, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = ours(ids, masked_positions=torch.arange(64)).logits[:, :65]
        assert torch.allclose(logits, theirs.float()(ids).logits.flatten(0, 1), atol=1e-5)


def test_without_a_schedule_there_are_no_snapshots(config, tmp_path):
    train(config, tmp_path / "run", {"train.steps": 1})
    assert not (tmp_path / "run" / "snapshots").exists()


def test_a_resumed_run_writes_its_snapshots_again(config, tmp_path):
    run = tmp_path / "run"
    train(config, run, SNAPSHOTS)
    path = run / "snapshots" / "step_00000003" / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(b"")
    (checkpoint(run, 6) / "manifest.json").unlink()
    train(config, run, SNAPSHOTS)  # from step 0
    assert path.read_bytes() == content


def test_waiting_for_the_disk_is_not_counted_as_training(config, tmp_path, monkeypatch):
    """By a clock that stands still but while training waits for the save before this one."""
    now, waiting = [0.0], threading.Event()
    finish = Saver.finish

    def slow(directory, part):
        assert waiting.wait(60)
        waiting.clear()
        now[0] += 1.0
        write_slice(directory, part)

    def wait(saver):
        if saver._writing is not None:
            waiting.set()
        finish(saver)

    monkeypatch.setattr(Saver, "finish", wait)
    overrides = {"checkpoint.every": 1, "train.steps": 4}
    trainer = train(config, tmp_path / "run", overrides, clock=lambda: now[0], write=slow)
    assert (now[0], trainer.built.throughput.seconds) == (5.0, 0.0)
