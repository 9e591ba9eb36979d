"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import browser  # noqa: F401 (a fixture)
from interpreter import interpret_kernels
from measured_run import measured_run, numbered_models, one_thread, run_inputs, small_run  # noqa: F401 (fixtures)
from small_data import make_packed, vocab_file, wordless_tokenizer  # noqa: F401 (fixtures)

ROOT = Path(__file__).resolve().parents[1]

interpret_kernels()  # before any test imports Triton


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with real data (Wikipedia, BLiMP, EWT, BERT's vocabulary); tests that need it skip without it."""
    path = Path(os.environ.get("MEGATRON_SAS_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"real data not found at {path}; set MEGATRON_SAS_DATA")
    return path


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A YAML file for tiny runs of 6 updates, half of whose sequences have no parse."""
    from engine_runs import write_inputs  # which imports more than most tests need

    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def fork_server() -> Iterator[object]:
    """One process from which training processes are forked."""
    from processes import ForkServer  # which imports more than most tests need

    with ForkServer() as running:
        yield running


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with many slow tests first: the last of a parallel run, which one process has alone, is a short one."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])
