#!/usr/bin/env python3
"""Kill and resume tiny training runs at random, and compare every finished one with a run that nothing happened to.

    python tests/faults/soak.py --cycles 200 --seed 1 --output soak.json

A cycle starts a run with one process or two, waits for a random time, and sends a signal: SIGKILL, SIGTERM, SIGUSR1 or
SIGINT, to one process or to all. What is left must be whole, and the next cycle goes on from it. A run that reaches its
end is compared bit for bit (weights, moments, records, TensorBoard points, snapshots), and another one begins.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from engine_runs import largest_difference, moments, records, weights, write_inputs  # noqa: E402
from processes import ForkServer, Job  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402

from megatron_sas.run.checkpoint import newest_checkpoint, read_state  # noqa: E402
from megatron_sas.run.reading import verify_checkpoint  # noqa: E402
from megatron_sas.run.records import read_records  # noqa: E402


def settings(steps: int) -> dict:
    """A run of `steps` updates, a multiple of 24, in which everything happens often."""
    return {
        "train.steps": steps,
        "train.decay_horizon": 1000,
        "checkpoint.every": 8,
        "checkpoint.keep_last": 2,
        "checkpoint.keep_every": steps // 3,
        "snapshots.every": steps // 4,
        "evaluation.every": steps // 8,
        "logging.every": 3,
        "logging.tensorboard": True,
    }


KINDS = (signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""As often as they are drawn: a kill is the hardest."""


@dataclass
class Report:
    """What happened."""

    cycles: int = 0  # runs that were interrupted
    too_late: int = 0  # runs that had come to their end when the signal was due; not counted as cycles
    signals: Counter = field(default_factory=Counter)
    stopped_with_marker: int = 0
    interrupted_steps: list[int] = field(default_factory=list)
    finished_runs: int = 0
    seconds: float = 0.0

    def lines(self) -> dict:
        """As JSON."""
        return vars(self) | {"signals": dict(self.signals)}


def soak(
    fork_server: ForkServer, directory: Path, cycles: int, seed: int, steps: int, say: Callable[[str], None]
) -> Report:
    """Run the cycles, and then the unfinished runs to their ends. Raises AssertionError at the first difference."""
    chance, report, started = random.Random(seed), Report(), time.monotonic()
    config = write_inputs(directory)
    wholes = {ranks: directory / f"whole-{ranks}" for ranks in (1, 2)}
    durations = {}
    for ranks, whole in wholes.items():
        began = time.monotonic()
        fork_server.train(config, whole, settings(steps), ranks=ranks)
        durations[ranks] = time.monotonic() - began
    runs: dict[int, Path] = {}
    while report.cycles < cycles:
        ranks = chance.choice((1, 2))
        run = runs.setdefault(ranks, directory / f"run-{ranks}-{report.finished_runs}-{report.cycles}")
        if _cycle(fork_server, config, run, ranks, steps, chance, durations[ranks], report):
            _check_finished(runs.pop(ranks), wholes[ranks], steps)
            report.finished_runs += 1
        say(f"cycle {report.cycles}: {run.name} at step {_step(run)}; {report.finished_runs} finished")
    for ranks, run in runs.items():
        fork_server.train(config, run, settings(steps), ranks=ranks)
        _check_finished(run, wholes[ranks], steps)
        report.finished_runs += 1
    report.seconds = round(time.monotonic() - started, 1)
    return report


def _cycle(
    fork_server: ForkServer,
    config: Path,
    run: Path,
    ranks: int,
    steps: int,
    chance: random.Random,
    duration: float,
    report: Report,
) -> bool:
    """Start, wait, send a signal, see what is left; True when the run came to its end."""
    left = 1 - max(_step(run), 0) / steps
    job = fork_server.start(config, run, settings(steps), ranks=ranks)
    time.sleep(chance.uniform(0, duration * (0.3 + 0.7 * left)))
    kind = chance.choice(KINDS)
    to = chance.choice([None, [chance.randrange(ranks)]])
    before = job.exits()
    job.send(kind, to)
    codes = job.wait_as_launchers_do()
    if before == [None] * ranks:
        report.cycles += 1
        report.signals[f"{kind.name} to {'all' if to is None or ranks == 1 else 'one of two'}"] += 1
    else:
        report.too_late += 1
    check_left(run)
    finished = _finished(run, steps)
    if kind != signal.SIGKILL and before == [None] * ranks:
        _check_stop(run, job, codes, kind, finished)
        report.stopped_with_marker += (run / "requeue").exists()
    if not finished:
        report.interrupted_steps.append(_step(run))
    return finished


def _check_stop(run: Path, job: Job, codes: list[int], kind: signal.Signals, finished: bool) -> None:
    """A signal that asks: stopped with a marker, or finished, or so early that there was no handler yet."""
    if codes == [-kind] * len(codes) or -kind in codes or 130 in codes:
        return
    assert set(codes) == {0}, job.output()
    assert (run / "requeue").exists() != finished, job.output()


def check_left(run: Path) -> None:
    """Every checkpoint that can be seen is whole, and so are records and snapshots."""
    for path in (run / "checkpoints").glob("step_*"):
        verify_checkpoint(path)
    if (run / "metrics.jsonl").exists():
        read_records(run / "metrics.jsonl")
    for snapshot in (run / "snapshots").glob("step_*"):
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in snapshot.iterdir()}


def _fail(line: str) -> None:
    raise AssertionError(line)


def _step(run: Path) -> int:
    newest = newest_checkpoint(run, _fail)
    return -1 if newest is None else read_state(newest)["step"]


def _finished(run: Path, steps: int) -> bool:
    return _step(run) == steps and any(line.get("event") == "finished" for line in read_records(run / "metrics.jsonl"))


def _check_finished(run: Path, whole: Path, steps: int) -> None:
    """Equal to the run that nothing happened to; then removed."""
    assert largest_difference(weights(run, steps), weights(whole, steps)) == 0.0
    assert largest_difference(moments(run, steps), moments(whole, steps)) == 0.0
    for kind in ("train", "evaluation"):
        mine, theirs = records(run, kind), records(whole, kind)
        different = {step: (mine.get(step), theirs.get(step)) for step in mine.keys() | theirs.keys()}
        different = {step: pair for step, pair in different.items() if pair[0] != pair[1]}
        assert not different, f"{run}: {kind} records differ: {different}"
    assert sorted(records(run)) == list(range(1, steps + 1))
    assert _points(run) == _points(whole), f"{run}: TensorBoard differs"
    for snapshot in (whole / "snapshots").glob("step_*"):
        mine = run / "snapshots" / snapshot.name / "model.safetensors"
        assert largest_difference(load_file(mine), load_file(snapshot / "model.safetensors")) == 0.0
    kept = {int(path.name[5:]) for path in (run / "checkpoints").glob("step_*")}
    assert kept >= {0, steps // 3, 2 * steps // 3, steps} and len(kept) == 5, f"{run}: kept {sorted(kept)}"
    assert not (run / "requeue").exists()
    shutil.rmtree(run)


def _points(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows, without what depends on the clock."""
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}, purge_orphaned_data=False).Reload()
    tags = [f"train/{name}" for name in ("loss", "mlm_loss", "grad_norm", "lr")] + ["evaluation/validation_mlm_loss"]
    return {tag: sorted((point.step, point.value) for point in board.Scalars(tag)) for tag in tags}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=200, help="kills and resumes (200)")
    parser.add_argument("--seed", type=int, default=1, help="of the moments and signals (1)")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, ForkServer() as fork_server:
        report = soak(fork_server, Path(directory), arguments.cycles, arguments.seed, 240, partial(print, flush=True))
    text = json.dumps(report.lines(), indent=2)
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
