"""What a program prints is lost, whoever does not take it: it goes on and writes its files all the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from engine_runs import LAUNCHER_VARIABLES, ROOT, checkpoint, records

from megatron_sas.run.reading import verify_checkpoint

CLEAN = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}


def check_finished(run):
    verify_checkpoint(checkpoint(run, 6))
    assert sorted(records(run)) == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_a_run_whose_pipe_is_closed_goes_on(fork_server, config, tmp_path):
    """As with `| head -3`."""
    pipe = tmp_path / "log-0.txt"
    os.mkfifo(pipe)
    job = fork_server.start(config, tmp_path / "run", log=tmp_path / "log")
    with pipe.open() as reader:
        lines = [reader.readline() for _ in range(3)]
    assert job.wait() == [0]
    assert "parameters" in lines[0]
    check_finished(tmp_path / "run")


@pytest.mark.slow
def test_a_run_whose_log_is_on_a_full_disk_goes_on(fork_server, config, tmp_path):
    (tmp_path / "log-0.txt").symlink_to("/dev/full")
    job = fork_server.start(config, tmp_path / "run", log=tmp_path / "log")
    assert job.wait() == [0]
    check_finished(tmp_path / "run")


@pytest.mark.slow
def test_a_run_that_is_started_without_output_writes_its_files_only(config, tmp_path):
    """As by `>&- 2>&- <&-`: files that are opened later would have the numbers of these streams."""
    command = [sys.executable, "pretrain_mlm.py", "--config", config, "--run.output_dir", tmp_path / "run"]
    shell = ["sh", "-c", 'exec "$@" >&- 2>&- <&-', "sh", *map(str, command)]
    assert subprocess.run(shell, cwd=ROOT, env={**CLEAN, "OMP_NUM_THREADS": "1"}).returncode == 0
    check_finished(tmp_path / "run")
    assert all(json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())


def inspect(config, output, stdout):
    tool = ROOT / "tools" / "inspect_data.py"
    command = [sys.executable, tool, "--data", config.with_name("data0"), "--output", output]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=CLEAN)


def test_a_tool_whose_pipe_is_closed_ends_quietly_and_writes_its_file(config, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    done = inspect(config, tmp_path / "out.json", writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads((tmp_path / "out.json").read_text())


def test_a_tool_whose_output_does_not_fit_on_the_disk_writes_its_file_and_fails(config, tmp_path):
    with open("/dev/full", "w") as full:
        done = inspect(config, tmp_path / "out.json", full)
    assert done.returncode == 2
    assert done.stderr == "error: standard output: No space left on device; not all of it was written\n"
    assert json.loads((tmp_path / "out.json").read_text())
