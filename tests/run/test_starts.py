"""What every start of a run was: command line, commit, packages."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from engine_runs import train, write_inputs

from megatron_sas.run.directory import RunDirectory
from megatron_sas.run.starts import git_state, last_start, package_versions, read_starts, record_start, slurm_job


def git(directory: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    return subprocess.run(
        ["git", "-C", str(directory), *identity, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    """A git checkout with a package and something else."""
    root = tmp_path / "checkout"
    (root / "megatron_sas").mkdir(parents=True)
    (root / "megatron_sas" / "a.py").write_text("a = 1\n")
    (root / "pretrain_mlm.py").write_text("pass\n")
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "first")
    git_state.cache_clear()
    yield root
    git_state.cache_clear()


def test_a_clean_checkout_has_its_commit(checkout):
    (checkout / "runs").mkdir()
    (checkout / "runs" / "metrics.jsonl").write_text("{}")  # no code
    assert git_state(checkout) == {"commit": git(checkout, "rev-parse", "HEAD"), "dirty": False}


@pytest.mark.parametrize("name", ["a.py", "new.py"])
def test_changed_and_further_code_is_dirty(checkout, name):
    (checkout / "megatron_sas" / name).write_text("a = 2\n")
    assert git_state(checkout) == {"commit": git(checkout, "rev-parse", "HEAD"), "dirty": True}


def test_without_a_checkout_there_is_none(checkout, tmp_path, monkeypatch):
    assert git_state(tmp_path) is None
    assert git_state(checkout / "megatron_sas") is None  # within another project's
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    git_state.cache_clear()
    assert git_state(checkout) is None


def test_a_variable_of_git_does_not_mislead(checkout, tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    assert git_state(checkout)["dirty"] is False


def test_versions_are_those_of_installed_packages():
    found = package_versions()
    assert found["torch"] == version("torch")
    assert found["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")


def test_starts_add_up_until_a_run_begins_anew(tmp_path, monkeypatch):
    run = RunDirectory(tmp_path)
    assert read_starts(run) == []
    monkeypatch.setattr(sys, "argv", ["pretrain_mlm.py", "--config", "a.yaml"])
    record_start(run, 0, anew=True)
    monkeypatch.setattr(sys, "argv", ["pretrain_mlm.py", "--config", "a.yaml", "--train.steps=9"])
    record_start(run, 3, anew=False)
    first, second = read_starts(run)
    assert (first["step"], first["command"]) == (0, ["pretrain_mlm.py", "--config", "a.yaml"])
    assert (second["step"], second["command"][-1], second["directory"]) == (3, "--train.steps=9", str(Path.cwd()))
    assert second["versions"] == package_versions()
    assert (second["host"], second["process"]) == (socket.gethostname(), os.getpid())
    assert last_start(run) == second
    assert list(tmp_path.iterdir()) == [run.starts]
    record_start(run, 0, anew=True)
    assert [start["step"] for start in read_starts(run)] == [0]


@pytest.mark.parametrize(
    ("variables", "job"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "12"}, "12"),
        ({"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}, "12_3"),
    ],
)
def test_a_start_records_its_slurm_job(tmp_path, monkeypatch, variables, job):
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    record_start(RunDirectory(tmp_path), 0, anew=True)
    assert slurm_job() == last_start(RunDirectory(tmp_path))["slurm_job"] == job


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": "other", "version": 1, "starts": []}'])
def test_an_unreadable_list_begins_anew_and_is_reported(tmp_path, content, capsys):
    run = RunDirectory(tmp_path)
    run.starts.write_text(content)
    assert last_start(run) == {}
    record_start(run, 3, anew=False)
    assert f"{run.starts}: is no list of starts that this program reads" in capsys.readouterr().err
    assert [start["step"] for start in read_starts(run)] == [3]


def test_half_written_lists_are_leftovers(tmp_path):
    half = tmp_path / ".starts.json.123.tmp"
    half.touch()
    assert half in RunDirectory(tmp_path).leftovers()


def test_a_run_and_its_branch_record_their_starts(tmp_path):
    config = write_inputs(tmp_path)
    for steps in (3, 6):
        train(config, tmp_path / "run", {"train.steps": steps})
    starts = read_starts(RunDirectory(tmp_path / "run"))
    assert [start["step"] for start in starts] == [0, 3]
    assert json.dumps(starts)  # plain JSON
    train(config, tmp_path / "branch", {"run.branch_from": str(tmp_path / "run" / "checkpoints" / "step_00000003")})
    assert [start["step"] for start in read_starts(RunDirectory(tmp_path / "branch"))] == [3]
