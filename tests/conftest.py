"""Fixtures shared by all tests."""

from __future__ import annotations

import gc
import os
import sys
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


@pytest.fixture(autouse=True)
def no_library_chosen() -> Iterator[None]:
    """What a run in this process has chosen to multiply with is not the next test's."""
    yield
    if module := sys.modules.get("megatron_sas.kernels.cpu_linear"):
        module.use_library(None)


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


SECONDS = {
    "slurm/test_training.py": 140, "faults/test_stopping.py": 110, "test_end_to_end.py": 110,
    "slurm/test_events.py": 80, "faults/test_faults.py": 80, "tools/test_run_sweep.py": 75,
    "train/test_two_processes.py": 60, "train/test_dry_run.py": 50, "faults/test_resume.py": 50,
    "test_launchers.py": 50, "train/test_zero_stages.py": 40, "kernels/test_dependency_attention.py": 40,
    "run/test_memory.py": 35, "train/test_nonfinite.py": 35, "kernels/test_triton.py": 35,
    "kernels/test_triton_compiles.py": 30, "objective/test_backends_agree.py": 30, "glue/test_finetune.py": 25,
    "faults/test_killed_while_saving.py": 25, "evaluation/test_minimal_pairs.py": 25, "kernels/test_window.py": 25,
    "tools/test_benchmarks.py": 25, "test_extending.py": 20, "kernels/test_entropy.py": 20,
    "trajectory/test_workers.py": 20, "kernels/test_several_sets.py": 20, "model/test_modernbert.py": 15,
    "kernels/test_edges.py": 15, "objective/test_pretraining.py": 15, "train/test_step.py": 15,
}  # fmt: skip
"""How long files take on two cores; those that are not here take less than the last."""


def pytest_collection_finish() -> None:
    """Keep what is imported out of garbage collections: DeepSpeed makes one every few lines of a start."""
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: the last of a parallel run, which one process has alone, is a short one."""
    tests = ROOT / "tests"
    items.sort(key=lambda item: -SECONDS.get(item.path.relative_to(tests).as_posix(), 0))
