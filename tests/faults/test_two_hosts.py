"""Training over a network: one of two hosts dies, comes back, and nothing of it is to be seen in the result."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from engine_runs import (
    ROOT,
    checkpoint,
    largest_difference,
    launch,
    moments,
    override_arguments,
    records,
    weights,
    write_inputs,
)
from virtual_hosts import Host, VirtualHosts, refusal

from megatron_sas.run.records import read_records

pytestmark = pytest.mark.full

STEPS = 100
OVERRIDES = {
    "train.steps": STEPS,
    "train.decay_horizon": 1000,
    "train.zero_stage": 2,
    "checkpoint.every": 20,
    "evaluation.every": STEPS,
}


@pytest.fixture
def hosts():
    reason = refusal()
    if reason is not None:
        pytest.skip(reason)
    with VirtualHosts() as pair:
        yield pair


def arguments(config: Path, run: Path) -> list:
    return [ROOT / "pretrain_mlm.py", "--config", config, "--run.output_dir", run, *override_arguments(OVERRIDES)]


def join(host: Host, first: Host, log: Path, *script: object):
    """Start torchrun's agent on a host; it meets the other's at the first host's address."""
    rendezvous = ["--rdzv_backend=c10d", f"--rdzv_endpoint={first.address}:29400", "--rdzv_id=1"]
    # A dead host counts as gone after 3 missed signs of life. torchrun does not see by itself whose address it is.
    settings = f"--rdzv_conf=is_host={int(host is first)},keep_alive_interval=1"
    options = [settings, "--max_restarts=2", f"--local_addr={host.address}"]
    launcher = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    # Otherwise (torch 2.13) a replaced host waits for an address that the survivor told in the first round only.
    return host.start(log, *launcher, *rendezvous, *options, *script, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")


def wait_for(condition, seconds: float, log: Path) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def test_a_host_dies_and_comes_back(hosts, tmp_path):
    """As when its power fails: its cable is dead first, so nobody is told, then its processes are killed.

    The survivor's worker waits for an answer that cannot come. When the host is back, its agent asks to join, and the
    survivor's agent replaces the worker.
    """
    first, second = hosts
    config, run, log = write_inputs(tmp_path), tmp_path / "run", tmp_path / "log"
    script = arguments(config, run)
    survivor = join(first, first, log, *script)
    join(second, first, log, *script)
    wait_for(checkpoint(run, 20).exists, 60, log)
    second.plug("down")
    second.kill()
    assert not checkpoint(run, STEPS).exists(), "the run was over before the host died"
    assert survivor.poll() is None
    second.plug("up")
    returned = join(second, first, log, *script)
    assert survivor.wait(timeout=120) == 0, log.read_text()
    assert returned.wait(timeout=30) == 0, log.read_text()

    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    launch(*launcher, *arguments(config, tmp_path / "whole"))
    starts = [line for line in read_records(run / "metrics.jsonl") if line.get("event") == "start"]
    assert [line["world_size"] for line in starts] == [2, 2]
    assert 20 <= starts[1]["step"] < STEPS
    assert largest_difference(weights(run, STEPS), weights(tmp_path / "whole", STEPS)) == 0.0
    assert largest_difference(moments(run, STEPS), moments(tmp_path / "whole", STEPS)) == 0.0
    assert records(run) == records(tmp_path / "whole")
