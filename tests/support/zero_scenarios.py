"""Training runs inside one process group that count what they communicate.

    torchrun --nproc_per_node N zero_scenarios.py JOB.json

A job is {"config": base.yaml, "directory": …, "runs": [{"name", "overrides": {...}}, …]}. Rank 0 writes for each run
`NAME-collectives.json`: a list of [collective, elements, bytes per element] of its last update, those of single numbers
and of the few counters left out.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist

from megatron_sas.config import load_config
from megatron_sas.core import distributed
from megatron_sas.train.trainer import Trainer

COUNTER_BYTES = 8  # int64; nothing of the model has such elements
COLLECTIVES = ("all_reduce", "reduce", "broadcast", "all_gather", "reduce_scatter", "all_to_all_single") + (
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
)


def counting(calls: list, name: str):
    """torch's collective `name`, which also notes the largest tensor that it was given."""
    original = getattr(dist, name)

    def call(*arguments, **options):
        tensors = [value for value in (*arguments, *options.values()) if isinstance(value, torch.Tensor)]
        largest = max(tensors, key=torch.Tensor.numel)
        calls.append([name, largest.numel(), largest.element_size()])
        return original(*arguments, **options)

    return mock.patch.object(dist, name, call)


def main() -> None:
    """Run every scenario."""
    calls: list = []
    job = json.loads(Path(sys.argv[1]).read_text())
    patches = [counting(calls, name) for name in COLLECTIVES]  # before DeepSpeed looks the functions up
    for patch in patches:
        patch.start()
    for run in job["runs"]:
        directory = Path(job["directory"]) / run["name"]
        overrides = [f"--{name}={json.dumps(value)}" for name, value in run["overrides"].items()]
        trainer = Trainer(load_config(job["config"], [*overrides, f"--run.output_dir={directory}"]))
        update, last = trainer.engine.update, []

        def one_update(*arguments, update=update, last=last):
            calls.clear()
            result = update(*arguments)
            last[:] = [call for call in calls if call[1] > 1 and call[2] != COUNTER_BYTES]
            return result

        with mock.patch.object(trainer.engine, "update", one_update):
            trainer.run()
        if distributed.is_main():
            directory.with_name(f"{run['name']}-collectives.json").write_text(json.dumps(last))
    distributed.shutdown()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # as pretrain_mlm.py
