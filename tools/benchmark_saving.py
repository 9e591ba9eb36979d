#!/usr/bin/env python3
"""What saving costs a training run: updates with a save every so often, beside the same updates without.

    python tools/benchmark_saving.py --config examples/wiki-mini.yaml --run.output_dir /scratch/try --output saving.json
    deepspeed tools/benchmark_saving.py --config examples/paper-base.yaml --every 100

Takes a run's configuration and overrides as `pretrain_mlm.py` does. In every round each way makes --every updates:

    none             saves nothing
    checkpoint       begins a checkpoint, as a run does: written, hashed, flushed and published by a thread
    snapshot         the same for the model alone
    waited for       a checkpoint that is waited for before the updates go on
    deepspeed        DeepSpeed's `save_checkpoint`, which is neither hashed nor flushed

and waits for its save at the end, as the next save would. The cost is the median over rounds of the ratio to `none`. It
writes to run.output_dir, which must not exist and is removed afterwards; evaluation is left out. By default a thread
computes on each core but one (--threads), as a training node has cores to spare.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _checkout
from megatron_sas.core.cli import InputError, run_main
from megatron_sas.core.files import check_absent, write_json_atomic
from megatron_sas.run.directory import RunDirectory

if TYPE_CHECKING:
    import torch

    from megatron_sas.config import Config
    from megatron_sas.core.benchmark import Times

NO_EVALUATION = ("--evaluation.treebank", "null", "--evaluation.blimp", "null")
WARMUP = 1


class Run:
    """A training run without its loop: updates, and saves of several kinds."""

    def __init__(self, config: Config, device: torch.device, every: int) -> None:
        from megatron_sas.objective.pretraining import MaskedLMWithTerms
        from megatron_sas.train.build import build_state, make_saver
        from megatron_sas.train.step import Engine

        self.config, self.every, self.step = config, every, 0
        self.run = RunDirectory(config.run.output_dir)
        state = build_state(config, lambda _: None)
        self.dataset, self.terms = state.dataset, state.terms
        module = MaskedLMWithTerms(state.bert, self.terms)
        self.engine = Engine(module, config.train, config.seeds().dropout, device, config.optimizer_options())
        self.saver = make_saver(config, self.engine, state)

    def updates(self) -> None:
        """`every` updates, the messages of a save under way travelling with them, and the end of that save."""
        from megatron_sas.objective.terms import weights

        for _ in range(self.every):
            weight = weights(self.terms, self.step)
            window = self.dataset.window(self.step)
            result = self.engine.update(window, weight, measure=False, flags=self.saver.flags())
            self.saver.react(*result.flags)
            self.step += 1
        self.saver.finish()

    def save(self, *, checkpoint: bool, snapshot: bool, wait: bool) -> None:
        """Begin a save, maybe wait for it, then make updates."""
        self.saver.begin(self.step, {}, checkpoint=checkpoint, snapshot=self.run.snapshots if snapshot else None)
        if wait:
            self.saver.finish()
        self.updates()

    def save_with_deepspeed(self) -> None:
        """DeepSpeed's own, over the one before, then updates."""
        self.engine._engine.save_checkpoint(str(self.run.path / "deepspeed"), tag="newest", save_latest=False)
        self.updates()


def variants(run: Run) -> dict[str, Callable[[], None]]:
    """The ways by name."""
    return {
        "none": run.updates,
        "checkpoint": partial(run.save, checkpoint=True, snapshot=False, wait=False),
        "snapshot": partial(run.save, checkpoint=False, snapshot=True, wait=False),
        "waited for": partial(run.save, checkpoint=True, snapshot=False, wait=True),
        "deepspeed": run.save_with_deepspeed,
    }


def main() -> None:
    """Measure in turns and print a table."""
    arguments, overrides = parse_arguments()
    import torch

    from megatron_sas.config import load_config
    from megatron_sas.core import distributed
    from megatron_sas.core.benchmark import describe_device, time_interleaved
    from megatron_sas.launch.environment import initialize_distributed

    config = load_config(arguments.config, [*overrides, *NO_EVALUATION, "--checkpoint.keep_last", "1"])
    directory = Path(config.run.output_dir)
    if os.path.lexists(directory):
        raise InputError(f"run.output_dir: {directory} exists; name a directory to be made and removed")
    if arguments.output is not None:
        check_absent(arguments.output, arguments.overwrite)
    torch.set_num_threads(arguments.threads)
    device = initialize_distributed(config.run.timeout_minutes)
    try:
        run = Run(config, device, arguments.every)
        times = time_interleaved(variants(run), arguments.rounds, device, warmup=WARMUP)
        written = RunDirectory(directory)
        sizes = {"checkpoint": _largest(written.checkpoints), "snapshot": _largest(written.snapshots)}
    finally:
        distributed.barrier()
        if distributed.is_main():
            shutil.rmtree(directory, ignore_errors=True)
    if distributed.is_main():
        result = {
            "device": describe_device(device),
            "processes": distributed.world_size(),
            "model": config.model.size,
            "zero_stage": config.train.zero_stage,
            "every": arguments.every,
            "rounds": arguments.rounds,
            "bytes": sizes,
            **summary(times, arguments.every),
        }
        print("\n".join(table(result)))
        if arguments.output is not None:
            write_json_atomic(arguments.output, result)
            print(f"wrote {arguments.output}")
    distributed.shutdown()


def _largest(directory: Path) -> int:
    """Bytes of the largest checkpoint or snapshot in `directory`."""
    return max(sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in directory.iterdir())


def summary(times: dict[str, Times], every: int) -> dict[str, Any]:
    """Seconds of an update without saves; by how much each way is slower, and how that spreads over the rounds."""
    from megatron_sas.core.benchmark import median_ratio

    base = times["none"]
    slower = {}
    for name, row in times.items():
        if name != "none":
            ratios = [a / b - 1 for a, b in zip(row.wall, base.wall, strict=True)]
            cpu = median_ratio(row.cpu, base.cpu) - 1
            slower[name] = {"wall": statistics.median(ratios), "rounds": sorted(ratios), "cpu": cpu}
    return {"seconds_per_update": statistics.median(base.wall) / every, "slower": slower}


def table(result: dict[str, Any]) -> list[str]:
    """Lines of Markdown."""
    device, sizes = result["device"], result["bytes"]
    lines = [
        f"{device['name']}, {result['processes']} process(es), model {result['model']}, a save every {result['every']} "
        f"updates of {result['seconds_per_update']:.3f} s; checkpoint {sizes['checkpoint'] / 1e6:.0f} MB, "
        f"snapshot {sizes['snapshot'] / 1e6:.0f} MB",
        "| | slower by the clock | lowest and highest round | more CPU time |",
        "|---|---:|---:|---:|",
    ]
    for name, row in result["slower"].items():
        low, high = row["rounds"][0], row["rounds"][-1]
        lines.append(f"| {name} | {row['wall']:.1%} | {low:.1%} to {high:.1%} | {row['cpu']:.1%} |")
    return lines


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """The command line, and the configuration's overrides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE.yaml", help="of a run; see examples/")
    parser.add_argument("--every", type=int, default=20, help="updates between saves (20)")
    parser.add_argument("--rounds", type=int, default=7, help="every way once a round (7)")
    parser.add_argument(
        "--threads", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="that compute (cores - 1)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="also write the figures")
    parser.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_known_args()


if __name__ == "__main__":
    run_main(main)
