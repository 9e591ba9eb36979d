"""The decision of examples/slurm/common.sh, case by case; `test_events.py` has it made on a real Slurm.

The facts are lines of `scontrol show job` as a real one has printed them. So is what srun says on standard error.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "examples" / "slurm"
SHELLCHECK = Path(sys.executable).with_name("shellcheck")

STAND_IN = """#!/usr/bin/env bash
# Of scontrol: what a real Slurm cannot be made to do, which is not to answer, is in the file `refuse`, once a line.
cd "{directory}"
case "$*" in
"show hostnames"*) printf 'node1\\nnode2\\n' ;;
"--oneliner show job"*) [ -s job ] || exit 1; cat job ;;
"--oneliner show partition"*) cat partition ;;
requeue*) echo "$*" >>asked; if [ -s refuse ]; then sed -i 1d refuse; exit 1; fi ;;
update*) echo "$*" >>asked ;;
esac
"""
PARTITION = "PartitionName=low PreemptMode={mode} State=UP\n"
ENDING = "srun: launch/slurm: _step_signal: Terminating StepId=7.0\n"
KILLED = f"srun: error: node2: task 1: Killed\n{ENDING}"
LOST_CONTACT = "srun: error: node1: task 0: Exited with exit code 3\n"


def facts(state="RUNNING", reason="None", restarts=0, preempted="PreemptTime=None", requeue=1):
    """A job's line; with preempt/none it has no PreemptTime."""
    return (
        f"JobId=7 JobName=x JobState={state} Reason={reason} Dependency=(null) Requeue={requeue} Restarts={restarts} "
        f"BatchFlag=1 Deadline=N/A {preempted} SuspendTime=None Partition=low\n"
    )


class Decision:
    """`finish` in a directory with a stand-in for scontrol."""

    def __init__(self, directory: Path):
        self.directory, self.run = directory, directory / "run"
        self.run.mkdir()
        for name in ("scontrol", "srun"):
            (directory / name).write_text(STAND_IN.format(directory=directory))
            (directory / name).chmod(0o755)

    def finish(
        self, code, *, mark=None, job=None, mode="REQUEUE", messages="", asked="", update=None, refuse=0, **environment
    ):
        """Exit code and output; `update`: the newest in the records."""
        (self.directory / "job").write_text(facts() if job is None else job)
        (self.directory / "partition").write_text(PARTITION.format(mode=mode))
        (self.directory / "refuse").write_text("\n" * refuse)
        (self.run / "requeue").unlink(missing_ok=True)
        if mark:
            (self.run / "requeue").write_text(mark + "\n")
        if update is not None:
            (self.run / "config.yaml").touch()
            lines = [f'{{"kind": "train", "step": {step}, "time": 1.0}}\n' for step in (update - 1, update)]
            (self.run / "metrics.jsonl").write_text("".join(lines) + '{"kind": "train", "st')
        script = f'source {SCRIPTS}/common.sh\ncat >"$messages"\nfinish {code} "{self.run}" {asked}\n'
        done = subprocess.run(
            ["bash", "-uo", "pipefail", "-c", script],
            input=messages,
            env={"PATH": f"{self.directory}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]"}
            | {"SLURM_JOB_PARTITION": "low", "SLURM_NTASKS_PER_NODE": "1", "REQUEUE_PAUSE": "0"}
            | {name: str(value) for name, value in environment.items()},
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    @property
    def asked(self) -> list[str]:
        """What Slurm was asked to do."""
        path = self.directory / "asked"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def decision(tmp_path):
    return Decision(tmp_path)


@pytest.mark.skipif(not SHELLCHECK.exists(), reason="shellcheck is not beside this Python")
def test_shellcheck_finds_nothing():
    scripts = [*SCRIPTS.iterdir(), *ROOT.glob("tests/slurm/*.sh"), *ROOT.glob("examples/*.sh"), ROOT / ".ci" / "run"]
    assert len(scripts) > 9
    done = subprocess.run([SHELLCHECK, "-x", *scripts], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


ABSENT, TIME = "", "PreemptTime=2026-12-01T14:46:25"


@pytest.mark.parametrize(
    ("job", "mode", "back", "words"),
    [
        pytest.param(facts("COMPLETING"), "REQUEUE", 0, "SIGTERM, cancelled): not requeued", id="scancel"),
        pytest.param(facts("COMPLETING", preempted=ABSENT), "OFF", 0, ", cancelled): not requeued", id="scancel-none"),
        pytest.param(facts("CANCELLED", preempted=ABSENT), "OFF", 0, ", cancelled): not requeued", id="scancel-done"),
        pytest.param(facts("COMPLETING", preempted=TIME), "REQUEUE", 0, ", cancelled): not", id="scancel-in-grace"),
        pytest.param(facts("COMPLETING", restarts=1, preempted=ABSENT), "OFF", 0, "Slurm has put", id="somebody"),
        pytest.param(facts("COMPLETING", restarts=1), "REQUEUE", 0, "Slurm has put job 7 back", id="grace-over"),
        pytest.param(facts(preempted=TIME), "REQUEUE", 1, ", preempted): job 7 goes back", id="in-grace"),
        pytest.param(facts("COMPLETING", preempted=TIME), "CANCEL", 0, "PreemptMode=CANCEL)): not", id="cancels"),
        pytest.param(facts(preempted=TIME), "CANCEL", 0, "PreemptMode=CANCEL)): not", id="cancels-in-grace"),
        pytest.param(facts("COMPLETING", "TimeLimit"), "OFF", 1, "its time was up): job 7 goes back", id="time-is-up"),
        pytest.param(facts(), "OFF", 1, "(SIGTERM): job 7 goes back", id="notice"),
        pytest.param(facts("SIGNALING"), "OFF", 1, "(SIGTERM): job 7 goes back", id="notice-on-its-way"),
        pytest.param(facts(requeue=0), "OFF", 0, "Slurm may not requeue it", id="no-requeue"),
    ],
)
def test_run_that_stopped_goes_back_as_slurm_shows_the_job(decision, job, mode, back, words):
    code, output = decision.finish(0, mark="SIGTERM", job=job, mode=mode)
    assert (code, decision.asked) == (0, ["requeue 7"] * back), output
    assert words in output and "suspected" not in output


def test_finished_run_says_nothing(decision):
    assert decision.finish(0, job="") == (0, "")


@pytest.mark.parametrize(("asked", "back"), [("", 0), ("1", 1)])
def test_file_stop_is_final_unless_the_script_made_it(decision, asked, back):
    _, output = decision.finish(0, mark="file run/stop", asked=asked)
    assert len(decision.asked) == back, output


def test_run_that_a_signal_to_the_script_killed_goes_back(decision):
    code, output = decision.finish(3, asked="1")
    assert code == 3 and decision.asked == ["requeue 7"] and "after a signal, exit code 3" in output


@pytest.mark.parametrize(
    ("code", "messages", "words", "suspect"),
    [
        (137, KILLED + "srun: error: node1: task 0: Exited with exit code 3\n", "task 1 on node2: Killed", "node2"),
        (139, "srun: error: node1: tasks 0-3: Segmentation fault\n", "task 0 on node1: Segmentation fault", "node1"),
        (247, "srun: error: node2: task 1: Exited with exit code 247\n", "ended with exit code 247", "node2"),
        (3, "srun: error: node1: task 0: Exited with exit code 3\n", "lost contact with another", None),
        (3, "srun: error: Node failure on node2\n", "node node2 was lost", "node2"),
        (
            3,
            f"{LOST_CONTACT}{ENDING}srun: First task exited 15s ago\nsrun: StepId=7.0 task 1: running\n",
            "nothing was heard of task 1 on node2",
            "node2",
        ),
    ],
)
def test_loss_goes_back_and_names_the_node(decision, code, messages, words, suspect):
    got, output = decision.finish(code, messages=messages, update=40)
    assert got == code and decision.asked == ["requeue 7"] and words in output, output
    assert (f"node {suspect} is suspected" in output) == (suspect is not None)
    assert (decision.run / "losses").read_text().startswith(f"7 40 loss {f'node={suspect}' if suspect else '-'} ")


def test_suspected_node_is_left_out_on_request(decision):
    _, output = decision.finish(137, messages=KILLED, EXCLUDE_SUSPECT=1)
    assert decision.asked == ["requeue 7", "update JobId=7 ExcNodeList=node2"], output


@pytest.mark.parametrize(
    ("messages", "code"),
    [
        ("srun: error: node2: task 1: Exited with exit code 1\n" + KILLED.replace("task 1", "task 0"), 1),
        (
            f"{LOST_CONTACT}srun: error: node2: task 1: Exited with exit code 2\n",
            2,
        ),
        ("", 137 - 10),
    ],
)
def test_own_fault_stays_out_whatever_became_of_the_other_tasks(decision, messages, code):
    got, output = decision.finish(137 if messages else code, messages=messages)
    assert (got, decision.asked) == (code, []) and "error: the run failed (" in output, output


def test_launcher_that_srun_has_ended_is_no_fault(decision):
    ended = f"{ENDING}srun: error: node1: task 0: Exited with exit code 1\n"
    decision.finish(247, messages="srun: error: node2: task 1: Exited with exit code 247\n" + ended)
    assert decision.asked == ["requeue 7"]


def test_loss_at_the_same_update_stays_out(decision):
    decision.finish(137, messages=KILLED, update=40)
    _, output = decision.finish(137, messages=KILLED, update=40)
    assert len(decision.asked) == 1 and "at update 40, where it was lost before" in output
    decision.finish(137, messages=KILLED, update=41)
    assert len(decision.asked) == 2
    decision.finish(137, messages=KILLED, update=41, SLURM_JOB_ID=8)  # another job, submitted by somebody
    assert len(decision.asked) == 3


REFUSED = "srun: error: Unable to create step for job 7: Invalid generic resource (gres) specification\n"


@pytest.mark.parametrize(
    ("restarts", "back", "words"),
    [
        (None, 0, ", in the job's first start): see"),
        (1, 1, "job 7 goes back"),
        (2, 0, "in an earlier start either): see"),
    ],
)
def test_start_without_an_update_that_slurm_refuses_is_tried_again_after_a_requeue(decision, restarts, back, words):
    environment = {"SLURM_RESTART_COUNT": restarts} if restarts else {}  # of a first start it is not set
    code, output = decision.finish(1, messages=REFUSED, job=facts(restarts=restarts or 0), **environment)
    assert code == 1 and len(decision.asked) == back and words in output, output
    assert not any(decision.run.iterdir())


def test_start_that_slurm_refuses_is_tried_once_more(decision):
    """As after the loss of a node (docs/clusters.md); the update is that of the loss."""
    decision.finish(137, messages=KILLED, update=40)
    _, output = decision.finish(1, messages=REFUSED, update=40)
    assert "(Slurm did not start its processes: Invalid generic resource (gres) specification): job 7 goes" in output
    decision.finish(1, messages=REFUSED, update=40)
    assert len(decision.asked) == 2
    decision.finish(137, messages=KILLED, update=41)
    decision.finish(1, messages=REFUSED, update=41)
    assert len(decision.asked) == 4


def test_loss_that_cannot_be_noted_stays_out(decision):
    (decision.run / "losses").mkdir()  # or it would be started again and again
    _, output = decision.finish(137, messages=KILLED, update=40)
    assert not decision.asked and "losses cannot be written): see" in output, output


@pytest.mark.parametrize(("job", "refuse"), [(facts(requeue=0), 0), (facts(), 9)])
def test_loss_is_noted_only_when_the_job_starts_again(decision, job, refuse):
    decision.finish(137, messages=KILLED, update=40, job=job, refuse=refuse)
    assert (decision.run / "losses").read_text() == ""


def test_losses_are_counted(decision):
    for update in range(10, 50, 10):
        _, output = decision.finish(137, messages=KILLED, update=update, MAX_RESTARTS=3)
    assert len(decision.asked) == 3 and "after MAX_RESTARTS=3 restarts" in output


OUT_OF_MEMORY = f"""\
slurmstepd-node2: error: Detected 1 oom-kill event(s) in StepId=7.0. Some of your processes may have been killed by \
the cgroup out-of-memory handler.
srun: error: node2: task 1: Out Of Memory
{ENDING}srun: error: node1: task 0: Terminated
srun: Force Terminated StepId=7.0
"""


def test_out_of_memory_goes_back_once(decision):
    """srun's exit code is then 1, which a program's own fault has too."""
    code, output = decision.finish(1, messages=OUT_OF_MEMORY, update=10)
    assert (code, decision.asked) == (1, ["requeue 7"]) and "suspected" not in output, output
    code, output = decision.finish(1, messages=OUT_OF_MEMORY, update=20)
    assert (code, len(decision.asked)) == (1, 1), output
    assert "(task 1 on node2 ran out of memory, for the second time)" in output


def test_loss_before_the_first_update_goes_back_once_and_leaves_no_file(decision):
    decision.finish(137, messages=KILLED)
    job = facts(restarts=1)
    _, output = decision.finish(137, messages=KILLED, job=job, SLURM_RESTART_COUNT=1)
    assert decision.asked == ["requeue 7"] and "no update was made in an earlier start either" in output, output
    assert not any(decision.run.iterdir())


@pytest.mark.parametrize(("times", "code"), [(2, 0), (9, 75)])
def test_slurm_that_does_not_answer_is_asked_again(decision, times, code):
    got, output = decision.finish(0, mark="SIGUSR1", refuse=times)
    assert got == code and len(decision.asked) == min(times + 1, 6), output
    assert ("could not be requeued: Slurm does not answer" in output) == (code == 75)


def test_silent_slurm_is_not_taken_for_a_cancelled_job(decision):
    code, output = decision.finish(0, mark="SIGUSR1", job="")
    assert code == 75 and "submit it again" in output


def test_element_of_an_array_is_requeued_alone(decision):
    decision.finish(0, mark="SIGUSR1", SLURM_ARRAY_JOB_ID=7, SLURM_ARRAY_TASK_ID=3)
    assert decision.asked == ["requeue 7_3"]


JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1"}


@pytest.mark.parametrize("script", ["single_node.sbatch", "multi_node_deepspeed.sbatch"])
@pytest.mark.parametrize(
    ("environment", "programs", "words"),
    [
        ({}, (), "is no job of Slurm: submit it with sbatch"),
        (JOB, (), "scontrol or srun is not in PATH"),
        (JOB, ("scontrol", "srun"), "is SLURM_CONF (unset) Slurm's configuration?"),
        (
            JOB | {"TMPDIR": "/nowhere"},
            ("scontrol", "srun", "mktemp"),
            "set TMPDIR to a directory that the job can write",
        ),
    ],
)
def test_job_that_cannot_begin_says_why_in_one_line(tmp_path, script, environment, programs, words):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "requeue").write_text("left alone\n")
    bin = tmp_path / "bin"
    bin.mkdir()
    for name in ("bash", "hostname"):
        (bin / name).symlink_to(f"/bin/{name}")
    for name in programs:  # a scontrol without Slurm's configuration says so, and nothing else
        knows = name == "scontrol" and "mktemp" in programs
        (bin / name).write_text("#!/bin/bash\n" + ("echo node1\n" if knows else "echo fatal >&2; exit 1\n"))
        (bin / name).chmod(0o755)
    done = subprocess.run(
        [bin / "bash", SCRIPTS / script, "config.yaml", tmp_path / "run"],
        cwd=ROOT,
        env={"PATH": str(bin), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stderr.splitlines() if line != "fatal"]  # mktemp's own
    assert done.returncode == 2 and len(lines) == 1 and words in lines[0], done.stderr
    assert (tmp_path / "run" / "requeue").exists()


def test_container_gets_the_command_and_its_folders(tmp_path):
    (tmp_path / "apptainer").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (tmp_path / "apptainer").chmod(0o755)
    script, environment = (
        SCRIPTS / "python_in_apptainer.sh",
        {"PATH": f"{tmp_path}:/usr/bin:/bin", "PWD": str(tmp_path)},
    )
    run = lambda **more: subprocess.run(  # noqa: E731
        [script, "a b", "c"], cwd=tmp_path, env=environment | more, capture_output=True, text=True, check=False
    )
    words = run(IMAGE="image.sif", BIND="/data").stdout.splitlines()
    assert words[:5] == ["exec", "--nv", "--bind", f"{tmp_path},/data", "--pwd"]
    assert words[5:] == [str(tmp_path), "image.sif", "python", "a b", "c"]
    assert run().returncode != 0 and "the container image" in run().stderr
