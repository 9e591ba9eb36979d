"""A branch under kill -9 at every write of its beginning: it begins anew, and is the run it would have been."""

from __future__ import annotations

import pytest
from engine_runs import checkpoint, largest_difference, moments, records, weights

pytestmark = pytest.mark.full

RELEASE = {"sas.schedule": [{"start": 0, "end": 3, "value": 0.1}], "logging.tensorboard": True}
POINTS = 60  # configuration, lineage, the parent's records, and the first checkpoint


def test_killed_at_every_point(fork_server, config, tmp_path):
    """Each kill finds what the one before has left, until there is a checkpoint; then another branch begins."""
    fork_server.train(config, tmp_path / "parent")
    fork_server.train(config, tmp_path / "whole", RELEASE)
    branch = {**RELEASE, "run.branch_from": str(checkpoint(tmp_path / "parent", 3)), "checkpoint.every": 1}
    for point in range(1, POINTS + 1):
        run = tmp_path / f"run-{point // 10}"
        job = fork_server.start(config, run, branch, fault={"kill_at": point, "from_step": -1})
        assert job.wait() in ([-9], [0]), job.output()
    for run in tmp_path.glob("run-?"):
        fork_server.train(config, run, branch)
        assert largest_difference(weights(run, 6), weights(tmp_path / "whole", 6)) == 0.0
        assert largest_difference(moments(run, 6), moments(tmp_path / "whole", 6)) == 0.0
        for kind in ("train", "evaluation"):
            assert records(run, kind) == records(tmp_path / "whole", kind)
        assert sorted(path.name for path in run.iterdir() if path.name.startswith(".")) == [".lock"]
