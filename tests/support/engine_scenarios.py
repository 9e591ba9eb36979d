"""Training scenarios run inside one process group, so that a test pays for the start once.

Every rank calls `main` (see fork_server.py), whose argument is the file of a job:
{"config": base.yaml, "directory": …, "runs": [{"name", "overrides": {...}}, …]}; runs happen in order, each in
the folder `name`, which may exist. `copy_of` an earlier run `without` some checkpoints is what a killed run leaves;
`fail_write_on_rank` makes that rank's tensors unwritable; `poison` (see nonfinite.py) spoils updates.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from pathlib import Path
from unittest import mock

from nonfinite import poisoned

from megatron_sas.config import load_config
from megatron_sas.core import distributed
from megatron_sas.core.cli import InputError
from megatron_sas.run import checkpoint
from megatron_sas.train.trainer import Trainer


def main() -> None:
    """Run every scenario; one that ends in an error leaves each rank's message in `NAME-error-RANK.txt`."""
    job = json.loads(Path(sys.argv[1]).read_text())
    for run in job["runs"]:
        overrides = [f"--{name}={json.dumps(value)}" for name, value in run["overrides"].items()]
        directory = Path(job["directory"]) / run["name"]
        if "copy_of" in run and distributed.is_main():
            ignore = shutil.ignore_patterns(*run["without"])
            shutil.copytree(Path(job["directory"]) / run["copy_of"], directory, ignore=ignore)
        distributed.barrier()
        write = checkpoint.write_weights
        if run.get("fail_write_on_rank") == distributed.rank():
            write = mock.Mock(side_effect=OSError(28, "No space left on device"))
        try:
            spoil = poisoned(**run["poison"]) if "poison" in run else contextlib.nullcontext()
            with mock.patch.object(checkpoint, "write_weights", write), spoil:
                Trainer(load_config(job["config"], [*overrides, f"--run.output_dir={directory}"])).run()
        except (InputError, OSError) as error:
            (Path(job["directory"]) / f"{run['name']}-error-{distributed.rank()}.txt").write_text(str(error))
    distributed.shutdown()
