"""Which slurmstepd a process belongs to; tests/slurm has a real one killed."""

from __future__ import annotations

import pytest

from megatron_sas.launch.slurmstepd import ENDED, is_gone, own_slurmstepd


@pytest.fixture
def proc(tmp_path):
    """A /proc: this process below a launcher with an odd name, below a slurmstepd."""
    rows = {"self": ("python", 20), "20": ("a (b) c", 10), "10": ("slurmstepd", 1), "1": ("init", 0), "30": ("bash", 1)}
    for process, (name, parent) in rows.items():
        (tmp_path / process).mkdir()
        number = process.replace("self", "25")
        (tmp_path / process / "stat").write_text(f"{number} ({name}) S {parent} 1 1 0\n")
    return tmp_path


def test_nearest_slurmstepd_is_found_above_a_launcher(proc):
    assert own_slurmstepd(proc) == 10


def test_no_slurmstepd_without_slurm(proc):
    (proc / "10" / "stat").write_text("7 (sshd) S 1 1 1 0\n")
    assert own_slurmstepd(proc) is None
    assert own_slurmstepd(proc / "nowhere") is None


@pytest.mark.parametrize(("task", "found"), [("25", ENDED), ("20", ENDED), ("7", None)])
def test_slurmstepd_that_ended_before_it_was_looked_for_is_gone(proc, monkeypatch, task, found):
    """SLURM_TASK_PID is this process, the launcher above it, or none of those that are seen, as in a container."""
    (proc / "20" / "stat").write_text("20 (bash) S 1 1 1 0\n")
    monkeypatch.setenv("SLURM_TASK_PID", task)
    assert own_slurmstepd(proc) == found
    assert is_gone(own_slurmstepd(proc), proc) == (found == ENDED)


def test_slurmstepd_is_gone_when_it_has_ended_or_another_has_its_number(proc):
    assert not is_gone(None, proc) and not is_gone(10, proc)
    assert is_gone(30, proc) and is_gone(40, proc)
    (proc / "10" / "stat").write_text("7 (slurmstepd) Z 1 1 1 0\n")
    assert is_gone(10, proc)


def test_first_answer_is_kept(proc):
    assert own_slurmstepd(proc) == 10
    (proc / "10" / "stat").unlink()
    assert own_slurmstepd(proc) == 10 and is_gone(10, proc)
