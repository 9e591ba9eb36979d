"""Inputs of the engine's tests, made once."""

from __future__ import annotations

import pytest
from engine_runs import write_inputs


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    """A YAML file for tiny runs of 6 updates, half of whose sequences have no parse."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))
