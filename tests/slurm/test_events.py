"""The batch scripts of examples/slurm on a real Slurm: what happens to a job, and what the scripts make of it.

All events happen before the first test, at the same time (`slurm_events.py`); a test looks at one.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import slurm_cluster
import slurm_events
from slurm_events import PLAIN, PREEMPTION, Outcome

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("real_slurm")]

BACK = "goes back into the queue"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return slurm_events.all_events(tmp_path_factory.mktemp("events"))


@pytest.fixture
def outcome(outcomes):
    """One of them by name."""

    def get(name: str) -> Outcome:
        assert isinstance(outcomes[name], Outcome), outcomes[name]
        return outcomes[name]

    return get


@pytest.mark.parametrize(
    "name", ["scancel", "scancel-deepspeed", "scancel-long", "scancel-preemptible", "grace-scancel", "unlimited"]
)
def test_scancel_is_final(outcome, name):
    found = outcome(name)
    assert (found.facts["JobState"], found.facts["Restarts"], found.starts) == ("CANCELLED", "0", 1), found.output
    assert found.said().endswith(", cancelled): not requeued; submit the job again to continue"), found.output


def test_no_message_says_that_slurm_did_not_answer(outcomes):
    for name, found in outcomes.items():
        assert isinstance(found, Outcome), f"{name}: {found}"
        assert "could not be requeued" not in found.output and "pending execution" not in found.output, found.output


@pytest.mark.parametrize("name", ["requeue", "no-grace"])
def test_job_that_somebody_requeues_is_not_asked_for_again(outcome, name):
    found = outcome(name)
    assert found.requeued and found.starts == 2 and found.last["Restarts"] == "1", found.output
    assert "Slurm has put job" in found.said() and BACK not in found.output, found.output


@pytest.mark.parametrize("name", ["requeue", "scancel-long"])
def test_no_node_is_held_longer_than_saving_takes(outcome, name):
    assert outcome(name).seconds < 15  # 3 to save; requeueing in vain took half a minute


@pytest.mark.parametrize(
    "name", ["grace", "grace-deepspeed", "time-limit", "time-limit-deepspeed", "importing", "importing-again"]
)
def test_job_that_was_asked_to_stop_goes_back_into_the_queue(outcome, name):
    found = outcome(name)
    assert found.requeued and found.starts == 2, found.output
    assert found.said().endswith(BACK), found.output
    first, second = found.job.starts()
    assert first["step"] == 0 and second["step"] >= (1 if name.startswith("importing") else 5)
    assert not (found.job.run / "stop").exists()
    assert (
        first["arguments"][-4:]
        == second["arguments"][-4:]
        == ["--config", "config.yaml", "--run.output_dir", str(found.job.run)]
    )
    # Another number for the step, or what was meant for the first start may reach the second.
    assert (first["SLURM_STEP_ID"], second["SLURM_STEP_ID"]) == ("0", "1")


def test_preemption_is_final_in_a_partition_that_cancels(outcome):
    found = outcome("cancel")
    assert found.facts["JobState"] == "PREEMPTED" and found.starts == 1
    assert "preempted in a partition that cancels (PreemptMode=CANCEL)): not requeued" in found.said(), found.output


@pytest.mark.parametrize("name", ["stop-file", "stop-file-deepspeed"])
def test_file_stop_is_final(outcome, name):
    found = outcome(name)
    assert (found.facts["JobState"], found.starts) == ("COMPLETED", 1)
    assert found.said().startswith("stopped before its end (file ") and "not requeued" in found.said(), found.output


def test_tasks_get_what_they_need(outcome):
    first, second = (outcome("unlimited").job.starts(rank)[0] for rank in (0, 1))
    assert first["HF_HUB_OFFLINE"] == "1"
    assert (
        first["MASTER_ADDR"] == second["MASTER_ADDR"] and first["MASTER_ADDR"] in slurm_cluster.NODES
    )  # its only node
    assert first["MASTER_PORT"] == second["MASTER_PORT"]
    assert (second["SLURM_PROCID"], second["SLURM_LOCALID"], second["SLURM_CPUS_PER_TASK"]) == ("1", "1", "2")


def test_each_node_has_its_deepspeed_launcher(outcome):
    for rank in (0, 1):
        arguments = outcome("grace-deepspeed").job.starts(rank)[0]["arguments"]
        assert arguments[:5] == ["-m", "deepspeed.launcher.runner", "--no_ssh", "--node_rank", str(rank)]
        assert arguments[5:7] == ["--master_addr", "127.0.0.1"]


def test_job_that_slurm_may_not_requeue_says_so(outcome):
    found = outcome("no-requeue")
    assert (found.facts["JobState"], found.starts) == ("COMPLETED", 1)
    assert "and Slurm may not requeue it" in found.said(), found.output


@pytest.mark.parametrize("name", ["kill-task", "kill-task-waits", "kill-slurmstepd", "watchdog"])
def test_loss_ends_the_step_within_a_minute_and_is_started_again(outcome, name):
    found = outcome(name)
    assert found.requeued and found.seconds < 60, found.output
    assert found.said(), found.output
    if name != "watchdog":  # which is repeated
        assert found.starts == 2 and found.last["JobState"] == "CANCELLED", found.output


@pytest.mark.parametrize("name", ["kill-task", "kill-task-waits", "kill-slurmstepd"])
def test_lost_node_is_suspected(outcome, name):
    assert "node 127.0.0.2 is suspected (EXCLUDE_SUSPECT=1" in outcome(name).output


@pytest.mark.parametrize("name", slurm_events.NODE_TITLES)
def test_second_start_after_the_loss_of_a_node_is_not_stopped_by_what_was_meant_for_the_first(outcome, name):
    """Slurm 22.05 may refuse one start meanwhile."""
    found = outcome(name)
    assert found.seconds < 60 and found.said(), found.output
    assert found.last["JobState"] == "CANCELLED" and found.starts == 2, found.output
    assert int(found.last["Restarts"]) == 1 + found.output.count("(Slurm did not start its processes: "), found.output


@pytest.mark.parametrize(("name", "code"), [("fault-1", 1), ("fault-2", 2), ("fault-2-waits", 2)])
def test_own_fault_is_not_started_again_and_keeps_its_exit_code(outcome, name, code):
    found = outcome(name)
    assert (found.facts["JobState"], found.facts["ExitCode"], found.starts) == ("FAILED", f"{code}:0", 1), found.output
    assert f"(task 1 on 127.0.0.2 ended with exit code {code})" in found.said(), found.output


def test_failure_that_repeats_at_the_same_update_is_not_started_again(outcome):
    found = outcome("repeats")
    assert found.starts == 2 and found.last["JobState"] == "FAILED", found.output
    assert "Segmentation fault, at update 20, where it was lost before)" in found.output


def test_lack_of_memory_is_tried_once_more(outcomes, outcome):
    if "memory" not in outcomes:
        pytest.skip("memory cgroups of version 1 cannot be made here, or no Slurm starts that uses them")
    found = outcome("memory")
    assert found.starts == 2 and found.last["JobState"] == "FAILED", found.output
    assert "task 1 on 127.0.0.2 ran out of memory): job" in found.output
    assert "(task 1 on 127.0.0.2 ran out of memory, for the second time)" in found.output


def test_losses_are_bounded(outcome):
    found = outcome("max-restarts")
    assert (found.facts["JobState"], found.starts) == ("FAILED", 1)
    assert "after MAX_RESTARTS=0 restarts" in found.said(), found.output


def test_taken_port_is_retried_with_another(outcome):
    found = outcome("taken-port")
    assert "is taken: trying another" in found.output and found.facts["JobState"] == "COMPLETED", found.output


def test_last_element_of_an_array_is_started_again_alone(outcome):
    found = outcome("array-last")
    assert found.requeued and found.starts == 2, found.output
    assert found.last["JobState"] == "COMPLETED"


def test_every_case_is_looked_at():
    """One that nobody asks for would be run for nothing."""
    source = Path(__file__).read_text()
    assert all(f'"{name}"' in source for name in PLAIN | PREEMPTION)


def test_table_has_a_line_for_every_event(outcomes):
    lines = slurm_events.table(outcomes).splitlines()
    assert len(lines) == 2 + len(outcomes) and all(line.count("|") == 6 for line in lines)
