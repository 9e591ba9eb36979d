"""What the ring holds. The watch in real runs: tests/faults/test_watch_killed.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from engine_runs import override_arguments

from megatron_sas.config import load_config
from megatron_sas.run.directory import step_name
from megatron_sas.train.onset_snapshots import OnsetSnapshots

SECTION = {"watch.metrics": ["loss"], "watch.delta": 20, "watch.every": 5, "watch.keep": 12}


@pytest.mark.parametrize(
    ("published", "begun", "expected"),
    [
        (100, 100, range(45, 101, 5)),
        (0, 100, [0, *range(45, 101, 5)]),  # 45 is what a restart from 100 would miss, once 100 is whole
        (30, 30, [*range(0, 31, 5), *range(50, 101, 5)]),
        (-1, None, range(50, 101, 5)),
    ],
)
def test_the_ring_has_what_now_and_what_a_restart_would_need(config, tmp_path, published, begun, expected):
    (tmp_path / "metrics.jsonl").touch()
    settings = load_config(config, override_arguments({**SECTION, "run.output_dir": str(tmp_path)}))
    saver = SimpleNamespace(published=published, step=begun)
    records = SimpleNamespace(path=tmp_path / "metrics.jsonl")
    watch = OnsetSnapshots(settings, -1, records, saver, print)
    for step in range(0, 101, 5):
        (tmp_path / "ring" / step_name(step)).mkdir(parents=True)
    assert watch.place(105) == tmp_path / "ring"
    assert sorted(path.name for path in (tmp_path / "ring").iterdir()) == [step_name(s) for s in expected]
