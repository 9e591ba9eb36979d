"""Training scenarios run inside one process group, so that a test pays for the imports once.

    torchrun --nproc_per_node N engine_scenarios.py JOB.json

A job is {"config": base.yaml, "runs": [{"name", "overrides": {...}}, …]}; runs happen in order, each in its own directory.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_sas import distributed  # noqa: E402
from megatron_sas.cli import InputError  # noqa: E402
from megatron_sas.config import load_config  # noqa: E402
from megatron_sas.engine.trainer import Trainer  # noqa: E402


def main() -> None:
    """Run every scenario; a refused one leaves its message in `refused.txt`."""
    job = json.loads(Path(sys.argv[1]).read_text())
    for run in job["runs"]:
        overrides = [f"--{name}={json.dumps(value)}" for name, value in run["overrides"].items()]
        directory = Path(job["directory"]) / run["name"]
        try:
            Trainer(load_config(job["config"], [*overrides, f"--run.output_dir={directory}"])).run()
        except InputError as error:
            (Path(job["directory"]) / f"{run['name']}-refused.txt").write_text(str(error))
    distributed.leave()


if __name__ == "__main__":
    main()
