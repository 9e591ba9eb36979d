"""Small training runs for tests: in this process, or several in one job of two processes."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import torch
import yaml
from safetensors.torch import load_file
from synthetic_data import write_packed

from megatron_sas.config import load_config
from megatron_sas.run.records import read_records

if TYPE_CHECKING:
    from processes import ForkServer

    from megatron_sas.train.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
OF_ARCHITECTURE = {
    "bert": {"hidden_dropout": 0.1},
    "modernbert": {
        "architecture": "modernbert",
        "global_attn_every_n_layers": 2,
        "local_attention": 8,
        "mlp_dropout": 0.1,
    },
}
"""Fields of `model` that only one architecture has."""


def free_port() -> int:
    """A port of this machine that nothing uses, from below those that the system gives to whoever wants any."""
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = range(max(1024, low // 2), low) or (0,)  # not `random`'s: equal seeds would choose equal ports
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", random.SystemRandom().choice(ports)))
            return probe.getsockname()[1]


def write_inputs(directory: Path, architecture: str = "bert") -> Path:
    """Training and validation data, and the configuration of a run of 6 updates; returns the YAML file."""
    train, validation = write_packed(directory, seed=0), write_packed(directory, seed=1, sequences=10)
    config = {
        "run": {"output_dir": str(directory / "run")},
        "model": {
            "size": "tiny",
            "num_layers": 2,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": 32,
            "attention_dropout": 0.0,
            **OF_ARCHITECTURE[architecture],
        },
        "data": {"train": train, "validation": validation},
        "sas": {"schedule": [{"start": 0, "end": 4, "value": 0.1}]},
        "train": {
            "steps": 6,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "precision": "fp32",
            "learning_rate": 1e-3,
            "warmup_steps": 2,
            "decay_horizon": 100,
            "weight_decay": 0.01,
            "adam_eps": 1e-6,  # the default divides gradients that are nothing but rounding by their own size
        },
        "checkpoint": {"every": 3},
        "evaluation": {"every": 3},
        "logging": {"every": 1, "tensorboard": False},
    }
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def override_arguments(overrides: dict) -> list[str]:
    """`{"train.steps": 3}` as command-line overrides (JSON is YAML)."""
    return [f"--{name}={json.dumps(value)}" for name, value in overrides.items()]


def train(
    config: Path,
    output_dir: Path,
    overrides: dict | None = None,
    *,
    threads: int = 1,
    prepare: Callable[[Trainer], object] = lambda trainer: None,
    **options: object,
) -> Trainer:
    """Run `Trainer` (with its `options`) in this process and return it; the environment stays.

    `prepare` is called with the trainer before it runs.
    """
    from megatron_sas.train.trainer import Trainer

    before, linear = torch.get_num_threads(), torch.nn.functional.linear
    clean = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    with mock.patch.dict(os.environ, clean | {"OMP_NUM_THREADS": "1"}, clear=True):
        torch.set_num_threads(threads)
        try:
            arguments = override_arguments({**(overrides or {}), "run.output_dir": str(output_dir)})
            trainer = Trainer(load_config(config, arguments), **options)
            prepare(trainer)
            trainer.run()
        finally:
            torch.set_num_threads(before)
            torch.nn.functional.linear = linear  # ZeRO-3 puts another one there, indefinitely
    return trainer


def train_two_processes(fork_server: ForkServer, config: Path, directory: Path, runs: list[dict]) -> str:
    """Run all of `runs` (see engine_scenarios.py) in one job of two processes; returns what it printed."""
    job = directory / "job.json"
    job.write_text(json.dumps({"config": str(config), "directory": str(directory), "runs": runs}))
    return fork_server.call("engine_scenarios:main", job, log=directory / "log", ranks=2)


def launch(*arguments: object, expect: int = 0, timeout: int = 300, **environment: str) -> str:
    """Run this Python with `arguments`, check the exit code, and return stdout and stderr."""
    clean = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        env={**clean, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support'}", **environment},
    )
    assert done.returncode == expect, f"exit code {done.returncode}\n{done.stdout}"
    return done.stdout


def checkpoint(run: Path, step: int) -> Path:
    """The directory of the checkpoint after `step` updates."""
    return run / "checkpoints" / f"step_{step:08d}"


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint."""
    return load_file(checkpoint(run, step) / "model.safetensors")


def moments(run: Path, step: int) -> dict[str, torch.Tensor]:
    """The optimizer moments of a checkpoint, from all of its shards."""
    shards = sorted(checkpoint(run, step).glob("optimizer-*.safetensors"))
    return {name: tensor for shard in shards for name, tensor in load_file(shard).items()}


def records(run: Path, kind: str = "train") -> dict[int, dict]:
    """Records of one kind by step, without what depends on the clock and the machine."""
    names = {"loss", "mlm_loss", "sas", "sas_per_edge", "sas_weight", "lr", "grad_norm"}
    names |= {"validation_mlm_loss", "validation_sas", "weight_norm", "event"}
    lines = [line for line in read_records(run / "metrics.jsonl") if line["kind"] == kind]
    assert len({line["step"] for line in lines}) == len(lines), f"{kind} records overlap"
    return {line["step"]: {name: line[name] for name in names & line.keys()} for line in lines}


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """The largest absolute difference between two sets of tensors of the same names."""
    assert first.keys() == second.keys()
    return max(float((first[name].double() - second[name].double()).abs().max()) for name in first)
