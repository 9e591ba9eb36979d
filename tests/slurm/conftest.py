"""Tests that need a real Slurm skip, with one reason, where none can be started."""

from __future__ import annotations

import pytest
import slurm_cluster


@pytest.fixture(scope="session")
def real_slurm():
    """Asked for by whole modules, so it comes before their clusters."""
    if reason := slurm_cluster.missing():
        pytest.skip(reason)
