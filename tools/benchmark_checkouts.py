#!/usr/bin/env python3
"""Time and memory of one update of the trainer: this checkout against another, in turn.

    git worktree add ../before COMMIT
    python tools/benchmark_checkouts.py --against ../before --config FILE.yaml --model.size tiny --output FILE.json

Both train as `pretrain_mlm.py` does, each in a process of its own, with the same configuration and overrides, into
directories that are removed afterwards. A process waits behind each step of its optimizer, so that only one trains at a
time; in every round each makes --updates updates, in a random order. An update is then everything from one optimizer
step to the next: forward and backward, clipping, DeepSpeed's bookkeeping, records, evaluations that fall due.

CPU time is that of all threads of the process, and steadier than the clock where other programs run; ratios are medians
of the ratios within a round, above 1 where this checkout is faster. Memory is what the process holds at most during one
of the first updates (resident, Linux only), and how much of that is not its before: free memory is given back to the
system first, for these updates alone, which are not timed. `start` is the CPU time until the optimizer's first step.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import _checkout
from megatron_sas.core.cli import InputError, progress, run_main
from megatron_sas.core.files import check_absent, write_json_atomic

THIS, OTHER = "this", "against"
TIMES, MEMORY = ("cpu", "wall"), ("peak", "more")
WARMUP = 2  # rounds; in the first memory is measured

WORKER = """
import ctypes, json, os, runpy, sys, time
checkout, *arguments = sys.argv[1:]
answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # what the trainer prints is not an answer
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))

def wait(*_):
    global cpu, wall, held
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    values = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    if held is not None:
        values |= {"peak": status("VmHWM"), "more": status("VmHWM") - held}
    cpu, held = time.process_time(), None
    print(json.dumps(values), file=answers)
    order = sys.stdin.readline()
    if not order:
        os._exit(0)
    if order == "memory\\n" and os.path.exists("/proc/self/clear_refs"):
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        held = status("VmRSS")
    wall = time.perf_counter()

cpu, wall, held = 0.0, time.perf_counter(), None
register_optimizer_step_post_hook(wait)
sys.path.insert(0, checkout)
sys.argv = [os.path.join(checkout, "pretrain_mlm.py"), *arguments]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""It knows of a checkout only its `pretrain_mlm.py`, so that old ones can be measured."""


class TrainingProcess:
    """A trainer that waits behind every step of its optimizer."""

    def __init__(self, checkout: Path, arguments: list[str], directory: Path) -> None:
        self._log = (directory / "log.txt").open("w+", encoding="utf-8")
        environment = os.environ | {"PYTHONPATH": str(checkout)}
        command = [sys.executable, "-c", WORKER, str(checkout), *arguments, "--run.output_dir", str(directory / "run")]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment
        )

    def read(self) -> dict[str, float]:
        """What the update took that the process was in: seconds `cpu` and `wall`.

        Raises:
            InputError: the trainer ended; with its last words.
        """
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise InputError(f"{self._process.args[3]}: {self._log.read().strip()[-1000:] or 'it ended'}")
        return json.loads(line)

    def update(self, *, memory: bool = False) -> dict[str, float]:
        """Let it make one update; with `memory` also the bytes `peak` and `more`, where the system tells."""
        self._process.stdin.write("memory\n" if memory else "\n")
        self._process.stdin.flush()
        return self.read()

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()
        self._log.close()


def measure(arguments: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
    """The figures of both, round by round, and the ratios between them."""
    checkouts = {THIS: Path(__file__).resolve().parents[1], OTHER: arguments.against.resolve()}
    steps = (WARMUP + arguments.rounds) * arguments.updates + 2
    given = ["--config", str(arguments.config.resolve()), *overrides, "--train.steps", str(steps)]
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
    processes: dict[str, TrainingProcess] = {}
    with tempfile.TemporaryDirectory() as temporary:
        try:
            once = {}
            for name, checkout in checkouts.items():
                directory = Path(temporary, name)
                directory.mkdir()
                processes[name] = TrainingProcess(checkout, given, directory)
                once[name] = {"start": processes[name].read()["cpu"]}
            order = random.Random(0)
            for number in progress(range(-WARMUP, arguments.rounds), unit="round", desc="timing"):
                for name in order.sample(list(processes), 2):
                    memory = number == -WARMUP
                    updates = [processes[name].update(memory=memory) for _ in range(arguments.updates)]
                    if number >= 0:
                        rounds[name].append({k: statistics.fmean(update[k] for update in updates) for k in TIMES})
                    elif memory:
                        once[name] |= {k: max(u[k] for u in updates) for k in MEMORY if k in updates[0]}
        finally:
            for process in processes.values():
                process.close()
    pairs = list(zip(rounds[OTHER], rounds[THIS], strict=True))
    ratios = {key: statistics.median(other[key] / this[key] for other, this in pairs) for key in TIMES}
    ratios |= {key: once[OTHER][key] / value for key, value in once[THIS].items()}
    return {"ratios": ratios, "once": once, "rounds": rounds}


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        "| checkout | CPU ms an update | ms by the clock | peak MiB | more than before it | CPU s to start |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, rounds in result["rounds"].items():
        once = result["once"][name]
        cells = [f"{1000 * statistics.median(row[key] for row in rounds):,.1f}" for key in TIMES]
        cells += [f"{once[key] / 2**20:,.0f}" if key in once else "-" for key in MEMORY] + [f"{once['start']:.1f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    ratios = [f"{result['ratios'][key]:.3f}" if key in result["ratios"] else "-" for key in (*TIMES, *MEMORY, "start")]
    return "\n".join([*lines, f"| {OTHER} / {THIS} | {' | '.join(ratios)} |"])


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """The command line, and the configuration's overrides.

    Raises:
        InputError: a number that makes no sense, a file that is missing, or an output that exists.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", required=True, type=Path, metavar="CHECKOUT", help="the other's directory")
    parser.add_argument("--config", required=True, type=Path, metavar="FILE.yaml", help="of a run; see examples/")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each that are timed (9)")
    parser.add_argument("--updates", type=int, default=1, help="updates of a turn (1)")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="also write the figures")
    parser.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    arguments, overrides = parser.parse_known_args()
    if min(arguments.rounds, arguments.updates) < 1:
        raise InputError("--rounds, --updates: must be at least 1")
    for path in (arguments.config, arguments.against / "pretrain_mlm.py"):
        if not path.is_file():
            raise InputError(f"{path}: there is no such file")
    if arguments.output is not None:
        check_absent(arguments.output, arguments.overwrite)
    return arguments, overrides


def main() -> None:
    """Measure, print a table, write the JSON."""
    arguments, overrides = parse_arguments()
    result = measure(arguments, overrides)
    from megatron_sas.core.benchmark import describe_device
    from megatron_sas.core.device import choose_device

    device = describe_device(choose_device(None))
    result = {"device": device, "config": arguments.config.name, "overrides": overrides, **result}
    print(", ".join(f"{name} {value}" for name, value in device.items()))
    print(f"{arguments.rounds} rounds of {arguments.updates} update(s)\n\n{table(result)}")
    if arguments.output is not None:
        write_json_atomic(arguments.output, result)


if __name__ == "__main__":
    run_main(main)
