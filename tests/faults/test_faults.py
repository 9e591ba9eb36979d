"""Dead and hung ranks, disks that are full or read-only, damaged files: clear messages, and runs that go on."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from engine_runs import checkpoint, largest_difference, moments, records, weights
from processes import steps_done, wait_until
from synthetic_data import write_packed

from megatron_sas.run.checkpoint import newest_checkpoint

pytestmark = pytest.mark.slow

STEPS = 50
RUN = {"train.steps": STEPS, "train.decay_horizon": 1000, "checkpoint.every": 10, "evaluation.every": 25}
LONG = RUN | {"train.steps": 90_000, "train.decay_horizon": 100_000}
UPDATES_ONLY = LONG | {"checkpoint.every": 100_000, "evaluation.every": 100_000}


@pytest.fixture(scope="module")
def whole(fork_server, config, tmp_path_factory):
    """The run of two processes that nothing happened to."""
    run = tmp_path_factory.mktemp("whole") / "run"
    fork_server.train(config, run, RUN, ranks=2)
    return run


def check_equal(run, whole):
    assert largest_difference(weights(run, STEPS), weights(whole, STEPS)) == 0.0
    assert largest_difference(moments(run, STEPS), moments(whole, STEPS)) == 0.0
    assert records(run) == records(whole)
    assert records(run, "evaluation") == records(whole, "evaluation")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank(fork_server, config, whole, tmp_path, victim):
    """The other one notices by itself and says so; started again, the run is the same."""
    run = tmp_path / "run"
    hold = {"before": "megatron_sas.train.step:Engine.update", "call": 26, "until": str(tmp_path / "never")}
    job = fork_server.start(
        config, run, RUN, ranks=2, fault={"rank": victim, "hold": hold}
    )  # or it might be done before
    wait_until(lambda: steps_done(run) >= 25 and (tmp_path / "never-reached").exists(), "training")
    job.send(signal.SIGKILL, [victim])
    codes = job.wait()
    assert (codes[victim], codes[1 - victim]) == (-9, 3), job.output()
    assert f"error: rank {1 - victim}: lost contact with another process (" in job.output()
    assert "Traceback" not in job.output()
    fork_server.train(config, run, RUN, ranks=2)
    check_equal(run, whole)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_hung_rank(fork_server, config, tmp_path, victim):
    run = tmp_path / "run"
    job = fork_server.start(config, run, UPDATES_ONLY | {"run.timeout_minutes": 0.1}, ranks=2)
    wait_until(lambda: steps_done(run) >= 5, "training")
    job.send(signal.SIGSTOP, [victim])
    wait_until(lambda: job.exits()[1 - victim] is not None, "the watchdog")
    assert time.time() - (run / "metrics.jsonl").stat().st_mtime > 3  # not at once after the last update
    assert job.exits()[1 - victim] == 3
    job.send(signal.SIGKILL)
    job.wait()
    message = next(line for line in job.output().splitlines() if "no progress" in line)
    assert message.startswith(f"error: rank {1 - victim}: no progress for 0.1 minutes in update ")
    if victim == 1:
        assert f"it waits for rank 1 on {socket.gethostname()} (silent for " in message
    else:
        assert "it waits for rank 0 or its launcher, which keeps the store" in message


@pytest.fixture
def shared_memory():
    """A file as NCCL leaves it in the memory that processes share, when they are killed while they begin."""
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("no /dev/shm to write to")
    descriptor, path = tempfile.mkstemp(dir="/dev/shm", prefix="nccl-")
    os.write(descriptor, b"x" * 2**20)
    os.close(descriptor)
    yield Path(path)
    os.unlink(path)


def test_what_a_killed_start_left_is_named_by_the_next_one(fork_server, config, tmp_path, shared_memory):
    """A process that still runs and shared memory; what nobody uses any more is not named."""
    run, host = tmp_path / "run", socket.gethostname()
    job = fork_server.start(config, run, LONG, ranks=2)
    wait_until(lambda: steps_done(run) >= 5, "training")
    job.send(signal.SIGSTOP, [1])
    job.send(signal.SIGKILL, [0])
    wait_until(lambda: job.exits()[0] is not None, "the end of rank 0")
    refused = fork_server.start(config, run, LONG | {"run.seed": 2})  # which forgets nothing
    assert refused.wait() == [2]
    again = fork_server.start(config, run, LONG, ranks=2)
    log = Path(f"{again.log}-0.txt")
    wait_until(lambda: log.exists() and "parameters" in log.read_text(), "the next start")
    job.send(signal.SIGKILL)
    again.send(signal.SIGTERM)
    assert again.wait() == [0, 0]
    first, second = job.pids
    assert f"killed or failed: process {first} on {host}, process {second} on {host}\n" in again.output()
    remedy = f"`kill -9 {second}` there ends it"
    assert f"process {second} on {host} is left of an earlier start and still holds memory; {remedy}" in again.output()
    assert f"shared memory that killed programs have left on {host}" in again.output()
    assert str(shared_memory) in again.output()
    assert shared_memory.exists()
    with shared_memory.open():  # somebody uses it
        output = fork_server.train(config, run, LONG | {"train.steps": steps_done(run) + 1}, ranks=2)
    assert "earlier start" not in output and str(shared_memory) not in output


def test_a_suspended_job_is_not_hung(fork_server, config, tmp_path):
    """All ranks stopped for longer than the timeout, as a scheduler does, and let go again."""
    run = tmp_path / "run"
    job = fork_server.start(config, run, UPDATES_ONLY | {"run.timeout_minutes": 0.1}, ranks=2)
    wait_until(lambda: steps_done(run) >= 5, "training")
    job.send(signal.SIGSTOP)
    time.sleep(7)
    job.send(signal.SIGCONT)
    before = steps_done(run)
    wait_until(lambda: steps_done(run) > before + 5, "progress")
    time.sleep(2)
    job.send(signal.SIGTERM)
    assert job.wait() == [0, 0], job.output()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own in `tmp_path / "disk"`; needs root. Yields a function that mounts it with options."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options):
        if os.geteuid() != 0 or shutil.which("mount") is None:
            pytest.skip("needs root to mount a file system")
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"cannot mount a file system here: {done.stderr.strip()}")
        return place

    yield mount
    while os.path.ismount(place):
        subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk(fork_server, config, whole, small_disk):
    """Whatever cannot be written any more, checkpoint or record: the last whole checkpoint stays, and is enough."""
    disk = small_disk("size=1500k")
    run = disk / "run"
    job = fork_server.start(config, run, RUN, ranks=2)
    codes = job.wait_as_launchers_do()
    assert 2 in codes, job.output()
    assert "No space left on device" in job.output()
    assert str(run) in job.output()
    assert "Traceback" not in job.output()
    assert newest_checkpoint(run, pytest.fail) is not None
    subprocess.run(["mount", "-o", "remount,size=50m", disk], check=True)
    fork_server.train(config, run, RUN, ranks=2)
    check_equal(run, whole)


def test_a_read_only_directory(fork_server, config, small_disk):
    """From the start, and while training."""
    disk = small_disk("size=50m")
    run = disk / "run"
    job = fork_server.start(config, run, LONG)
    wait_until(lambda: steps_done(run) >= 25, "training")
    # A file that is open for writing keeps a file system from becoming read-only, but not a mount of another directory.
    subprocess.run(["mount", "--bind", run / "checkpoints", run / "checkpoints"], check=True)
    subprocess.run(["mount", "-o", "remount,ro,bind", run / "checkpoints"], check=True)
    try:
        assert job.wait() == [2], job.output()
        assert "could not be written (rank 0: [Errno 30] Read-only file system" in job.output()
        assert "Traceback" not in job.output()
        newest = newest_checkpoint(run, pytest.fail)
        assert newest is not None
        job = fork_server.start(config, run, LONG)
        assert job.wait() == [2], job.output()
        assert "Read-only file system" in job.output()
        assert "Traceback" not in job.output()
    finally:
        subprocess.run(["umount", "-l", run / "checkpoints"], check=True)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    for place in (run, disk / "new"):
        job = fork_server.start(config, place, LONG, ranks=2, log=disk.parent / f"log-{place.name}")
        assert job.wait() == [2, 2], job.output()
        assert job.output().count("Read-only file system") == 1, job.output()
        assert "Traceback" not in job.output()
    assert newest_checkpoint(run, pytest.fail) == newest


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove(path: Path) -> None:
    path.unlink()


def test_damaged_shards(fork_server, config, whole, tmp_path):
    """The three newest checkpoints, each damaged in another way."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shard = "optimizer-00001-of-00002.safetensors"
    for step, damage in ((STEPS, truncate), (STEPS - 10, flip), (STEPS - 20, remove)):
        damage(checkpoint(run, step) / shard)
    output = fork_server.train(config, run, RUN, ranks=2)
    for step, reason in ((STEPS, "bytes, not"), (STEPS - 10, "SHA-256 differs"), (STEPS - 20, "is missing")):
        (line,) = [line for line in output.splitlines() if f"checkpoint step_{step:08d} is passed over: " in line]
        assert shard in line and reason in line
    assert f"continuing from {checkpoint(run, STEPS - 30)}" in output
    check_equal(run, whole)


@pytest.mark.parametrize(
    ("name", "dtype", "value", "message"),
    [("bin", "<u2", 65, "holds 65, which is not between 0 and 64"), ("heads.bin", "<i2", 32, "holds 32, which is not")],
)
def test_damaged_data(fork_server, config, tmp_path, name, dtype, value, message):
    """A value that cannot be, where it is needed first; and a file that was cut off."""
    prefix = write_packed(tmp_path / "data")
    path = Path(f"{prefix}.{name}")
    content = np.fromfile(path, dtype).reshape(24, 32)
    content[17, 5] = value
    content.tofile(path)
    overrides = LONG | {"data.train": prefix, "data.validation": None}
    job = fork_server.start(config, tmp_path / "run", overrides, ranks=2)
    assert 2 in job.wait(), job.output()
    assert f"error: rank {job.exits().index(2)}: {path}: sequence 17 {message}" in job.output()
    assert "copy it anew or preprocess again" in job.output()
    assert "Traceback" not in job.output()
    truncate(path)
    job = fork_server.start(config, tmp_path / "other", overrides, ranks=2)
    assert job.wait() == [2, 2]
    assert f"{path}: {24 * 32 * 2 - 7} bytes where the header says {24 * 32 * 2}" in job.output()
