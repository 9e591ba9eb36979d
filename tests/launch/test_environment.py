"""Which processes there are, by the variables of the launchers."""

from __future__ import annotations

import os
from unittest import mock

import pytest
import torch

from megatron_sas.core.cli import InputError
from megatron_sas.core.distributed import local_world_size
from megatron_sas.launch.environment import (
    environment_from_launcher,
    number_of_processes,
    other_threads,
    share_cores,
    share_of_cores,
)

ALLOCATION = {  # what a shell inside an allocation of two nodes has, which srun did not start
    "SLURM_JOB_ID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_NTASKS_PER_NODE": "4",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
STEP = {
    **ALLOCATION,
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_TASKS_PER_NODE": "4,2",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}


@pytest.fixture
def environment():
    with mock.patch.dict(os.environ, clear=True):
        yield os.environ


def test_a_shell_inside_an_allocation_is_one_process(environment):
    environment.update(ALLOCATION)
    environment_from_launcher()
    assert number_of_processes() == 1
    assert "RANK" not in environment


@pytest.mark.parametrize(
    ("tasks_per_node", "node", "expected"), [("4,2", 1, "2"), ("3(x2)", 1, "3"), ("2(x3),1", 3, "1"), ("6", 0, "6")]
)
def test_a_task_of_srun(environment, tasks_per_node, node, expected):
    environment.update(STEP, SLURM_STEP_TASKS_PER_NODE=tasks_per_node, SLURM_NODEID=str(node))
    environment_from_launcher()
    assert number_of_processes() == 6
    found = {name: environment[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    assert found == {"RANK": "5", "WORLD_SIZE": "6", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": expected}


def test_another_launcher_below_srun_decides(environment):
    environment.update(STEP, RANK="3", WORLD_SIZE="4")
    environment_from_launcher()
    assert number_of_processes() == 4
    assert environment["RANK"] == "3"


@pytest.mark.parametrize("name", ["MASTER_ADDR", "MASTER_PORT"])
def test_tasks_that_cannot_meet(environment, name):
    environment.update(STEP)
    del environment[name]
    with pytest.raises(InputError, match=f"6 processes were started, but {name} is not set.*common.sh"):
        environment_from_launcher()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [({}, 1), ({"LOCAL_SIZE": "4"}, 4), ({"LOCAL_WORLD_SIZE": "2"}, 2)],
    ids=["python", "deepspeed", "torchrun"],
)
def test_each_process_of_a_host_takes_its_share_of_the_cores(environment, variables, expected):
    environment.update(variables)
    assert (local_world_size(), share_of_cores(8)) == (expected, 8 // expected)
    environment["OMP_NUM_THREADS"] = "3"
    assert share_of_cores(8) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="CPUs do not train here")
def test_the_share_of_the_cores_becomes_the_number_of_threads(environment):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1000)
        environment["OMP_NUM_THREADS"] = "3"
        share_cores()
        assert torch.get_num_threads() == 1000
        del environment["OMP_NUM_THREADS"]
        share_cores()
        assert torch.get_num_threads() == len(os.sched_getaffinity(0))
    finally:
        torch.set_num_threads(before)


def test_other_threads_are_named_where_results_could_be_the_same_bits():
    assert other_threads([1, 1], [1, 1]) is None
    assert other_threads([1], [1, 1]) is None  # another number of processes, which nobody takes for the same run
    assert other_threads(None, [1]) is None and other_threads([1], None) is None  # an old checkpoint, a GPU
    line = "threads per process: {}, where the checkpoint was made with {}; "
    assert other_threads([1, 1], [2, 2]).startswith(line.format(2, 1))
    assert other_threads([4, 4], [4, 8]).startswith(line.format([4, 8], 4))
