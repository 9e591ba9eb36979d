"""What a run is doing, from its directory: of real small runs, and of files as other hosts see them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from engine_runs import train
from processes import steps_done, wait_until
from run_files import ELSEWHERE, NOW, write_run_files

from megatron_sas.core.cli import InputError
from megatron_sas.core.directory_lock import LOCK
from megatron_sas.run.directory import RunDirectory
from megatron_sas.run.signals import StopRequest
from megatron_sas.run.status import IN_QUEUE, STATES, Activity, age, read_status

LONG = {"train.steps": 90_000, "train.decay_horizon": 100_000, "checkpoint.every": 100_000, "evaluation.every": 100_000}
STOPPED = {"event": "stopped", "reason": "SIGUSR1"}


def activity(run: RunDirectory, **options: object) -> Activity:
    found = read_status(run, NOW, **options).activity
    assert found.state in STATES
    return found


def test_a_run_while_it_goes_on_and_when_it_is_finished(config, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    run, seen = RunDirectory(tmp_path / "run"), []
    train(config, run.path, observer=lambda step, values: seen.append(read_status(run)) if step == 4 else None)
    during, after = seen[0], read_status(run)
    assert during.activity == Activity("running")
    assert after.activity == Activity("finished")
    assert (after.step, after.steps, after.checkpoint) == (6, 6, 6)
    for status in (during, after):
        assert (status.host, status.process, status.slurm_job) == (socket.gethostname(), os.getpid(), "12")
    assert (during.step, during.checkpoint) in [(3, 0), (3, 3)]  # the save of step 3 may be under way
    assert during.weights == {"sas": 0.1} and after.weights == {"sas": 0.0}  # the schedule ends at 4
    assert after.loss > 0 and after.tokens_per_second > 0
    assert 0 <= after.checkpoint_seconds < 60 and 0 <= after.silent_seconds < 60


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("SIGTERM", Activity("waiting", "stopped by SIGTERM, and no job starts it again", True)),
        ("SIGINT", Activity("stopped", "by Ctrl-C")),
        (None, Activity("stopped", "by a file stop")),
    ],
)
def test_a_run_that_was_asked_to_stop(config, tmp_path, reason, expected):
    run, request = RunDirectory(tmp_path / "run"), StopRequest()

    def ask(step, values):
        if step == 2 and reason is None:
            run.stop.touch()
            assert read_status(run).activity == Activity("running", "asked to save and end")
        elif step == 2:
            request.reason = reason

    train(config, run.path, stop=request, observer=ask)
    status = read_status(run)
    assert status.activity == expected
    assert 2 <= status.step < 6 and status.checkpoint == status.step


@pytest.mark.slow
def test_a_run_that_was_killed_and_then_continued(fork_server, config, tmp_path):
    run = RunDirectory(tmp_path / "run")
    job = fork_server.start(config, run.path, LONG)
    wait_until(lambda: steps_done(run.path) >= 3, "training")
    assert (read_status(run).activity.state, read_status(run).process) == ("running", job.pids[0])
    job.send(signal.SIGKILL)
    job.wait()
    reason = f"process {job.pids[0]} was killed or failed; its output says more"
    assert read_status(run).activity == Activity("failed", reason, True)
    elsewhere = read_status(run, this_host="elsewhere")  # where it only has not been heard of for a moment
    assert elsewhere.activity == Activity("running")
    later = read_status(run, now=run.records.stat().st_mtime + 7200, this_host="elsewhere").activity
    assert (later.state, later.needs_somebody) == ("lost", True)
    fork_server.train(config, run.path, LONG | {"train.steps": 6})
    assert read_status(run).activity == Activity("finished")


def test_a_run_on_another_host_is_lost_after_its_timeout(tmp_path):
    run = write_run_files(tmp_path / "run", lock=ELSEWHERE, seen=1799, job="4_5")
    status = read_status(run, NOW)
    assert status.activity == Activity("running")
    assert (status.host, status.process, status.slurm_job, status.silent_seconds) == ("node7", 12, "4_5", 1799)
    late = write_run_files(tmp_path / "late", lock=ELSEWHERE, seen=1811)  # its records are 10 s apart
    assert activity(late) == Activity("lost", "nothing from process 12 on node7 for 30m", True)


def test_records_far_apart_make_a_run_wait_longer(tmp_path):
    run = write_run_files(tmp_path / "run", lock=ELSEWHERE, seen=1900)
    text = run.records.read_text()
    rare = text.replace(f"{NOW - 1910}", f"{NOW - 1920 + 500}").replace(f"{NOW - 1900}", f"{NOW - 1900 + 1000}")
    run.records.write_text(rare)
    os.utime(run.records, (NOW - 1900, NOW - 1900))
    assert activity(run) == Activity("running")


def test_a_process_of_this_host_that_is_silent_is_lost(tmp_path):
    lock = f"process {os.getpid()} on {socket.gethostname()}"
    assert activity(write_run_files(tmp_path / "run", lock=lock)) == Activity("running")
    silent = activity(write_run_files(tmp_path / "silent", lock=lock, seen=7300))
    assert (silent.state, silent.reason) == ("lost", f"nothing from {lock} for 2h")


def test_a_process_of_this_host_that_is_gone_has_failed(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    lock = f"process {child.pid} on {socket.gethostname()}"
    failed = activity(write_run_files(tmp_path / "run", lock=lock))
    assert (failed.state, failed.needs_somebody) == ("failed", True)
    done = write_run_files(tmp_path / "done", lock=lock, end={"event": "finished"})  # killed in a start for nothing
    assert activity(done) == Activity("finished")


def test_records_alone_tell_where_there_is_no_lock(tmp_path):
    for name, seen, state in (("new", 60, "running"), ("old", 10_000, "lost")):
        run = write_run_files(tmp_path / name, seen=seen)
        (run.path / LOCK).unlink()
        assert activity(run).state == state


def test_a_start_whose_process_is_another_is_not_asked_for_the_job(tmp_path):
    run = write_run_files(tmp_path / "run", lock="process 99 on node8", job="4")
    status = read_status(run, NOW)
    assert (status.host, status.process, status.slurm_job) == ("node8", 99, None)


def test_a_run_waits_for_its_job(tmp_path):
    run = write_run_files(tmp_path / "run", end=STOPPED, requeue="SIGUSR1", job="4", seen=3600)
    assert activity(run) == Activity("waiting", "for job 4, since SIGUSR1")
    old = write_run_files(tmp_path / "old", end=STOPPED, requeue="SIGUSR1", job="4", seen=IN_QUEUE * 3)
    assert activity(old) == Activity("waiting", "for 3d since SIGUSR1; is job 4 still in the queue?", True)


def test_a_mark_that_is_gone_is_a_start_that_did_not_get_far(tmp_path):
    """The batch script removes it before it starts the processes."""
    run = write_run_files(tmp_path / "run", end=STOPPED, job="4")
    assert activity(run) == Activity("waiting", "is being started again")
    late = write_run_files(tmp_path / "late", end=STOPPED, job="4", seen=4000)
    assert activity(late) == Activity("waiting", "stopped by SIGUSR1; it was started again and did not get far", True)


def with_losses(path: Path, text: str, before: float, seen: float = 60.0, job: str = "4") -> RunDirectory:
    """A run with a file `losses`, as examples/slurm/common.sh writes it, that was last changed `before` seconds ago."""
    run = write_run_files(path, lock=ELSEWHERE, job=job, seen=seen)
    run.losses.write_text(text)
    os.utime(run.losses, (NOW - before, NOW - before))
    return run


LOSSES = "4 10 loss node=node7 task 1 on node7: Killed\n4 20 memory - task 0 on node7 ran out of memory\n"


def test_losses_are_counted_and_name_the_node_that_is_suspected_twice(tmp_path):
    run = with_losses(tmp_path / "run", LOSSES, 100)
    assert read_status(run, NOW).losses == 2 and activity(run) == Activity("running")
    more = LOSSES + "4 30 loss node=node7 node node7 was lost\n4 4"  # the last is being written
    suspicion = "node node7 is suspected of 2 of 3 losses of job 4; look at it; "
    suspicion += "the start of another job (sbatch --exclude=node7) clears this"
    assert activity(with_losses(tmp_path / "more", more, 100)) == Activity("running", suspicion, True)
    other = with_losses(tmp_path / "other", more, 100, job="5")
    assert read_status(other, NOW).losses == 3 and activity(other) == Activity("running")


def test_losses_of_earlier_versions_name_no_node(tmp_path):
    former = "4 7 loss task 1 on node7: Killed\n4 29 loss task 1 on node7: Killed\n4 30 loss node7 node lost\n"
    run = with_losses(tmp_path / "run", former, 100)
    assert read_status(run, NOW).losses == 3 and activity(run) == Activity("running")


def test_a_run_waits_for_its_next_start_after_a_loss(tmp_path):
    waiting = Activity("waiting", "for job 4, which starts again after: task 0 on node7 ran out of memory")
    run = with_losses(tmp_path / "now", LOSSES, 1)
    assert activity(run) == waiting
    run.starts.unlink()
    assert activity(run) == waiting
    old = activity(with_losses(tmp_path / "old", LOSSES, IN_QUEUE * 3, seen=IN_QUEUE * 3 + 5))
    asks = "for 3d since: task 0 on node7 ran out of memory; is job 4 still in the queue?"
    assert old == Activity("waiting", asks, True)
    lost = activity(with_losses(tmp_path / "lost", LOSSES, 20_000, seen=10_000))  # started again, then lost
    last = "the last loss before, at update 20: task 0 on node7 ran out of memory"
    assert lost == Activity("lost", f"nothing from process 12 on node7 for 2h; {last}", True)


def test_a_checkpoint_that_is_not_whole_needs_somebody(tmp_path):
    run = write_run_files(tmp_path / "run", lock=ELSEWHERE, checkpoints=(1, 2))
    assert read_status(run, NOW).checkpoint == 2
    (run.checkpoint(2) / "model.safetensors").write_text("")
    status = read_status(run, NOW)
    assert (status.checkpoint, status.checkpoint_seconds) == (1, 5.0)
    assert status.activity == Activity("running", "checkpoint step_00000002 is not whole", True)


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_a_loss_that_is_not_finite_needs_somebody(tmp_path, name):
    run = write_run_files(tmp_path / "run", lock=ELSEWHERE, update={name: None})
    assert activity(run) == Activity("running", "loss or gradient of update 2 is not finite", True)


def test_updates_are_found_before_a_large_evaluation(tmp_path):
    run = write_run_files(tmp_path / "run", lock=ELSEWHERE)
    with open(run.records, "a") as file:
        file.write(f'{{"kind": "evaluation", "step": 2, "time": {NOW}, "sets": "{"x" * 100_000}"}}\n')
    assert read_status(run, NOW).loss == 2.5


def test_files_of_earlier_versions_say_less(tmp_path):
    run = write_run_files(tmp_path / "run", lock=ELSEWHERE)
    run.config.write_text("train: {steps: 100}\n")
    run.starts.unlink()
    run.records.write_text('{"kind": "train", "step": 1, "loss": 2.0}\n{"kind": "train", "st')
    status = read_status(run, run.records.stat().st_mtime)
    assert (status.activity, status.step, status.loss) == (Activity("running"), 1, 2.0)
    assert (status.weights, status.tokens_per_second, status.checkpoint) == ({}, None, None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "is not valid YAML"),
        ("- a", "must be a mapping"),
        ("a: b", "train.steps or run.timeout_minutes is not a number; restore it, every checkpoint has a copy"),
        ("train: 3", "is not a number"),
        ("train: {steps: 3}\nrun: {timeout_minutes: soon}", "is not a number"),
    ],
)
def test_an_unreadable_configuration_is_an_error(tmp_path, content, message):
    run = write_run_files(tmp_path / "run")
    run.config.write_text(content)
    with pytest.raises(InputError, match=message) as error:
        read_status(run)
    assert str(run.config) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.9, "59s"), (60, "1m"), (3599, "59m"), (3600, "1h"), (172_799, "47h"), (172_800, "2d")],
)
def test_ages_are_short(seconds, text):
    assert age(seconds) == text
