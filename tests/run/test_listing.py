"""Finding runs and showing many of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_files import ELSEWHERE, NOW, write_run_files

from megatron_sas.core.cli import InputError
from megatron_sas.run.directory import RunDirectory
from megatron_sas.run.listing import find_runs, read_statuses, short, summary, table
from megatron_sas.run.status import Activity, RunStatus, read_status

LOST = Activity("lost", "nothing from process 12 on node7 for 3h", True)


def status(name: str, activity: Activity | None = None, **values: object) -> RunStatus:
    known = {"host": "node7.cluster", "process": 12, "step": 45_200, "steps": 100_000, "loss": 2.34567}
    known |= {"weights": {"sas": 0.001, "offset": 0.0}, "tokens_per_second": 981_234.5, "checkpoint": 45_000}
    known |= {"checkpoint_seconds": 700.0, "silent_seconds": 12.0, "slurm_job": "123456_78"}
    return RunStatus(Path(name), activity or Activity("running"), **(known | values))


def names(runs: list[RunDirectory], root: Path) -> list[str]:
    return sorted(str(run.path.relative_to(root)) for run in runs)


def test_runs_are_found_at_any_depth_and_once(tmp_path):
    for name in ("a", "sweep/minus/seed-1", "sweep/minus/seed-2"):
        write_run_files(tmp_path / name, checkpoints=(1,))
    write_run_files(tmp_path / ".hidden" / "b")
    write_run_files(tmp_path / "a" / "snapshots" / "inner")  # what lies in a run belongs to it
    (tmp_path / "config.yaml").write_text("data: corpus\n")  # somebody's configuration is not a run
    (tmp_path / "again").symlink_to(tmp_path / "a")
    (tmp_path / "loop").symlink_to(tmp_path)
    faults = []
    found = find_runs([tmp_path, tmp_path / "sweep", tmp_path / "a"], faults)
    assert len(found) == 3 and not faults
    assert {run.path.resolve() for run in found} == {
        tmp_path / name for name in ("a", "sweep/minus/seed-1", "sweep/minus/seed-2")
    }


def test_a_link_to_a_run_elsewhere_counts(tmp_path):
    write_run_files(tmp_path / "scratch" / "run")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "scratch" / "run")
    assert names(find_runs([tmp_path / "runs"], []), tmp_path) == ["runs/link"]


def test_a_missing_directory_is_an_error(tmp_path):
    with pytest.raises(InputError, match="absent: no such directory; give one with runs in or below it"):
        find_runs([tmp_path, tmp_path / "absent"], [])


def test_those_that_need_somebody_come_first(tmp_path):
    write_run_files(tmp_path / "a", end={"event": "finished"})
    write_run_files(tmp_path / "b", lock=ELSEWHERE)
    write_run_files(tmp_path / "c", end={"event": "stopped", "reason": "file stop"}, requeue="file stop")
    write_run_files(tmp_path / "d", end={"event": "stopped", "reason": "SIGTERM"}, requeue="SIGTERM")
    write_run_files(tmp_path / "e").config.write_text("a: [")
    faults = []
    statuses = read_statuses(find_runs([tmp_path], faults), faults)
    assert [(s.path.name, s.activity.state, s.activity.needs_somebody) for s in statuses] == [
        ("e", "unknown", True),
        ("d", "waiting", True),
        ("b", "running", False),
        ("c", "stopped", False),
        ("a", "finished", False),
    ]
    assert len(faults) == 1 and str(tmp_path / "e" / "config.yaml") in faults[0] and "\n" not in faults[0]
    assert statuses[0].activity.reason == "config.yaml cannot be read"
    text = summary(statuses)
    assert text == "5 runs (1 unknown, 1 waiting, 1 running, 1 stopped, 1 finished); 2 need somebody"


def test_a_run_that_is_removed_meanwhile_is_left_out(tmp_path):
    faults = []
    assert read_statuses([RunDirectory(tmp_path / "gone")], faults) == [] and not faults


def test_a_table_has_the_reason_below_its_run():
    statuses = [status("a", LOST), status("b")]
    header, first, reason, second = table(statuses, ["a", "b"], 80)
    assert header.split() == ["STATE", "RUN", "UPDATE", "LOSS", "λ", "TOK/S", "SAVED", "SEEN", "JOB/HOST"]
    assert first.split() == ["lost", "a", "45.2k/100k", "2.346", "0.001", "981k", "45k", "11m", "12s", "123456_78"]
    assert reason == "  ! nothing from process 12 on node7 for 3h"
    assert second.startswith("running a ".replace("a", "b"))


def test_a_wide_table_has_numbers_in_full_and_hosts():
    header, row = table([status("a")], ["a"], 140)
    assert row.split() == [
        *("running", "a", "45,200/100,000", "2.346", "0.001", "981,234", "45,000", "11m", "12s"),
        *("node7:12", "123456_78"),
    ]
    assert header.split()[-2:] == ["WHERE", "JOB"]


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_no_line_is_wider_than_asked(width):
    long = status(
        "x",
        Activity("lost", "a reason of many words " * 20, True),
        slurm_job="123456789_1234",
        step=1_234_567,
        steps=9_999_999,
        loss=1234.5,
        weights={"sas": -0.00123, "offset": 0.00456, "entropy": -0.1},
        checkpoint=1_234_567,
        checkpoint_seconds=3e6,
        silent_seconds=3e6,
    )
    lines = table([long, status("b", slurm_job=None)], ["sweep/sas-minus-300-strong/seed-12", "b"], width)
    assert max(map(len, lines)) <= width
    assert any("sweep/sas-minus-300-strong/seed-12" in line for line in lines)


def test_columns_without_anything_are_left_out():
    bare = RunStatus(Path("a"), Activity("unknown", "config.yaml cannot be read", True))
    assert table([bare], ["a"], 80) == ["STATE   RUN", "unknown a", "  ! config.yaml cannot be read"]


def test_losses_have_a_column_where_there_are_any():
    header, row = table([status("a", losses=3)], ["a"], 140)
    assert header.split()[7:9] == ["LOST", "SEEN"] and row.split()[8:10] == ["3", "12s"]


def test_terms_are_named_where_several_are_in_use():
    both = status("a", weights={"sas": 0.001, "offset": -0.1})
    assert "sas 0.001 offset -0.1" in table([both], ["a"], 140)[1]
    assert " 0 " in table([status("a", weights={"sas": 0.0})], ["a"], 140)[1]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (9999, "9999"), (10_000, "10k"), (45_234, "45.2k"), (999_999, "1M"), (1_250_000, "1.25M"), (None, "")],
)
def test_counts_are_short(value, text):
    assert short(value) == text


def test_values_are_what_json_has(tmp_path):
    run = write_run_files(tmp_path / "run", lock=ELSEWHERE, job="3", checkpoints=(2,))
    assert list(read_status(run, NOW).values().items()) == [
        ("path", str(run.path)),
        ("state", "running"),
        ("reason", None),
        ("needs_somebody", False),
        ("host", "node7"),
        ("process", 12),
        ("slurm_job", "3"),
        ("step", 2),
        ("steps", 100),
        ("loss", 2.5),
        ("weights", {"sas": 0.001}),
        ("tokens_per_second", 1e6),
        ("checkpoint", 2),
        ("checkpoint_seconds", 5.0),
        ("silent_seconds", 5.0),
        ("losses", 0),
    ]
