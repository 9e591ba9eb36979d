"""Files of runs in any state, without training: what a process of another host sees of them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import yaml

from megatron_sas.core.directory_lock import LOCK, SINCE
from megatron_sas.core.manifest import write_manifest
from megatron_sas.run.directory import RunDirectory

NOW = 1_800_000_000.0
ELSEWHERE = f"process 12 on node7{SINCE}1.00"


def write_run_files(
    path: Path,
    *,
    seen: float = 5.0,
    lock: str = "",
    end: dict | None = None,
    requeue: str | None = None,
    job: str | None = None,
    checkpoints: tuple[int, ...] = (),
    update: dict | None = None,
    steps: int = 100,
) -> RunDirectory:
    """A run that was last seen `seen` seconds before NOW: two updates, 10 s apart, and the event `end`."""
    run = RunDirectory(path)
    path.mkdir(parents=True)
    run.config.write_text(yaml.safe_dump({"run": {"timeout_minutes": 30.0}, "train": {"steps": steps}}))
    began = NOW - seen - 20
    values = {"loss": 2.5, "grad_norm": 1.0, "sas_weight": 0.001, "tokens_per_second": 1e6} | (update or {})
    lines = [{"kind": "event", "step": 0, "time": began, "event": "start"}]
    lines += [{"kind": "train", "step": step, "time": began + 10 * step, **values} for step in (1, 2)]
    lines += [{"kind": "event", "step": 2, "time": began + 20, **end}] if end else []
    run.records.write_text("".join(json.dumps(line) + "\n" for line in lines))
    start = {"step": 0, "host": "node7", "process": 12, "slurm_job": job}
    run.starts.write_text(json.dumps({"format": "megatron_sas starts", "version": 1, "starts": [start]}))
    (path / LOCK).write_text(f"{lock}\n" if lock else "")
    if requeue is not None:
        run.requeue.write_text(requeue + "\n")
    for step in checkpoints:
        run.checkpoint(step).mkdir(parents=True)
        (run.checkpoint(step) / "model.safetensors").write_text("weights")
        write_manifest(run.checkpoint(step), step=step)
    for file in [path, *path.rglob("*")]:
        os.utime(file, (NOW - seen, NOW - seen))
    return run
