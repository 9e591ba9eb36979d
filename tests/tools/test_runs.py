"""tools/runs.py: what it prints and the code with which it ends."""

from __future__ import annotations

import json

import pytest
from run_files import write_run_files
from tool_calls import run_tool

FINISHED = {"event": "finished"}
TERMINATED = {"event": "stopped", "reason": "SIGTERM"}


@pytest.fixture
def runs(tmp_path):
    write_run_files(tmp_path / "runs" / "minus" / "seed-1", end=FINISHED, checkpoints=(2,))
    write_run_files(tmp_path / "runs" / "minus" / "seed-2", end=TERMINATED, requeue="SIGTERM")
    return tmp_path / "runs"


def test_lists_runs_by_their_path_below_the_directory(runs, capsys):
    done = run_tool(capsys, "runs", runs)
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[:2] for line in lines[:2]] == [["STATE", "RUN"], ["waiting", "minus/seed-2"]]
    assert lines[2] == "  ! stopped by SIGTERM, and no job starts it again"
    assert lines[3].split()[:3] == ["finished", "minus/seed-1", "2/100"]
    assert lines[4] == "2 runs (1 waiting, 1 finished); 1 needs somebody"
    assert max(map(len, lines)) <= 80


def test_several_directories_have_runs_by_their_paths(runs, capsys):
    output = run_tool(capsys, "runs", runs / "minus" / "seed-1", runs / "minus" / "seed-2").stdout
    assert str(runs / "minus" / "seed-1") in output
    assert str(runs / "minus" / "seed-1") in run_tool(capsys, "runs", runs / "minus" / "seed-1").stdout


def test_needs_lists_those_alone_and_tells_by_its_code(runs, capsys):
    done = run_tool(capsys, "runs", "--needs", runs)
    assert done.returncode == 1
    assert "minus/seed-2" in done.stdout and "minus/seed-1" not in done.stdout
    done = run_tool(capsys, "runs", "--needs", runs / "minus" / "seed-1")
    assert (done.returncode, done.stdout) == (0, "1 run (1 finished); none needs somebody\n")


def test_json_is_a_list_of_objects(runs, capsys):
    done = run_tool(capsys, "runs", "--json", runs)
    first, second = json.loads(done.stdout)
    assert (first["path"], first["needs_somebody"]) == (str(runs / "minus" / "seed-2"), True)
    assert (second["state"], second["checkpoint"], second["weights"]) == ("finished", 2, {"sas": 0.001})
    assert json.loads(run_tool(capsys, "runs", "--json", "--needs", runs / "minus" / "seed-1").stdout) == []


def test_bad_input_is_one_line_each(runs, tmp_path, capsys):
    absent, empty = tmp_path / "absent", tmp_path / "empty"
    empty.mkdir()
    for directory, message in (
        (absent, f"error: {absent}: no such directory; give one with runs in or below it\n"),
        (empty, f"error: {empty}: no run in or below it; a run has config.yaml and metrics.jsonl\n"),
    ):
        done = run_tool(capsys, "runs", directory)
        assert (done.returncode, done.stderr, done.stdout) == (2, message, "")
    (runs / "minus" / "seed-1" / "config.yaml").write_text("- a\n")
    done = run_tool(capsys, "runs", runs)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {runs / 'minus' / 'seed-1' / 'config.yaml'}: must be a mapping")
    assert "unknown" in done.stdout and "minus/seed-2" in done.stdout  # the others are listed all the same
