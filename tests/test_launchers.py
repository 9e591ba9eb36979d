"""The ways to start training: python, torchrun, and the deepspeed launcher. None needs a compiler."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest
from engine_runs import ROOT, free_port, launch, records, train, write_inputs

import pretrain_mlm
from megatron_sas.core.cli import CommonError, InputError
from megatron_sas.run.signals import StopRequest

SCRIPT = ROOT / "pretrain_mlm.py"
NO_COMPILER = {"CXX": "/nowhere/g++", "TORCH_EXTENSIONS_DIR": "/nowhere"}
DEEPSPEED = Path(sys.executable).with_name("deepspeed")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def expected(config, tmp_path_factory):
    """What every launcher must arrive at: the records of the same run in this process."""
    run = tmp_path_factory.mktemp("expected") / "run"
    train(config, run, {"train.steps": 2})
    return records(run) | records(run, "evaluation")


def arguments(config, run):
    return [SCRIPT, "--config", config, "--run.output_dir", run, "--train.steps", "2", "--logging.tensorboard=true"]


def check(run, output, expected, processes):
    found = records(run) | records(run, "evaluation")
    assert found.keys() == expected.keys()
    for step, line in found.items():
        assert line == pytest.approx(expected[step], rel=1e-5)
    assert f"batch 8 = {processes} × 2 × {4 // processes}" in output
    assert output.count("finished after 2 updates") == 1
    assert (run / "checkpoints" / "step_00000002" / "manifest.json").is_file()
    assert list((run / "tensorboard").iterdir())


@pytest.mark.slow
def test_python(config, expected, tmp_path):
    output = launch(*arguments(config, tmp_path / "run"))
    check(tmp_path / "run", output, expected, processes=1)


@pytest.mark.slow
def test_a_port_that_another_program_has(config, tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        first = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        output = launch(*arguments(config, tmp_path / "run"), expect=2, **first)
    assert output.strip() == f"error: MASTER_PORT: {port} is taken by another program on this host; choose another port"


@pytest.mark.slow
def test_torchrun(config, expected, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    output = launch(*launcher, *arguments(config, tmp_path / "run"), **NO_COMPILER)
    check(tmp_path / "run", output, expected, processes=2)


@pytest.mark.slow
@pytest.mark.skipif(not DEEPSPEED.exists(), reason="the deepspeed launcher is not beside this Python")
def test_the_deepspeed_launcher(config, expected, tmp_path):
    launcher = [DEEPSPEED, "--num_gpus", "2", "--master_port", str(free_port())]
    output = launch(*launcher, *arguments(config, tmp_path / "run"), **NO_COMPILER)
    check(tmp_path / "run", output, expected, processes=2)


@pytest.mark.slow
def test_a_fault_of_all_processes_is_one_line(fork_server, config, tmp_path):
    job = fork_server.start(config, tmp_path / "no", {"train.micro_batch_size": 8}, ranks=2)
    assert job.wait() == [2, 2]
    fault = "error: train.global_batch_size: 8 is not a multiple of micro_batch_size 8 × 2 processes"
    assert job.output().count(fault) == 1
    assert "Traceback" not in job.output()
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("rank", "error", "stopped", "printed"),
    [
        (0, CommonError("x"), False, "error: x\n"),
        (1, CommonError("x"), False, ""),
        (1, InputError("x"), False, "error: rank 1: x\n"),
        (1, OSError(5, "Input/output error", "x"), False, "error: rank 1: [Errno 5] Input/output error: 'x'\n"),
        (1, InputError("x"), True, ""),  # another has failed first, and the launcher stops this one
    ],
)
def test_a_fault_of_one_rank_is_printed_and_one_of_all_once(monkeypatch, capsys, rank, error, stopped, printed):
    stop = StopRequest()

    def sleep(seconds):
        stop.reason = "SIGTERM" if stopped else None

    monkeypatch.setenv("RANK", str(rank))
    pretrain_mlm.report_fault(error, stop, sleep)
    assert capsys.readouterr().err == printed


def test_a_configuration_that_the_second_host_lacks(tmp_path):
    second = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    output = launch(SCRIPT, "--config", tmp_path / "config.yaml", expect=2, **second)
    assert output.startswith(f"error: rank 1: {tmp_path / 'config.yaml'}: no such file")


def test_a_wrong_configuration_is_a_few_lines_and_no_run(config, tmp_path):
    output = launch(*arguments(config, tmp_path / "run"), "--train.micro_batch=3", "--modle.size=tiny", expect=2)
    assert output.splitlines()[0] == f"error: {config}: 2 faults:"
    assert "modle: unknown field; did you mean model?" in output
    assert "train.micro_batch: unknown field; did you mean micro_batch_size?" in output
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists()
