"""The soak of a run under a real Slurm, `soak.py`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


@pytest.mark.full
@pytest.mark.usefixtures("real_slurm")
def test_run_through_twenty_random_events_equals_an_undisturbed_one(tmp_path):
    specification = importlib.util.spec_from_file_location("slurm_soak", Path(__file__).with_name("soak.py"))
    soak = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(soak)
    said = []
    report = soak.soak(tmp_path, 20, 1, said.append)
    assert sum(report["events"].values()) == 20, said
