"""A run of 6 updates, measured as a trajectory: fixtures that the tests of `trajectory/` and of its tool share."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from megatron_sas.trajectory.measure import Inputs

STEPS = [0, 2, 3, 4, 6]


@contextlib.contextmanager
def single_thread() -> Iterator[None]:
    """The last bits of a sum depend on the number of threads."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_thread():
    """`single_thread` for a test."""
    with single_thread():
        yield


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """A folder with a run of 6 updates, its data, and a treebank and minimal pairs over its vocabulary."""
    from engine_runs import train, write_inputs  # which imports more than most tests need

    path = tmp_path_factory.mktemp("trajectory")
    rng = np.random.default_rng(0)
    sentences = []
    for _ in range(40):
        size = int(rng.integers(3, 9))
        heads = [0] + [int(rng.integers(1, word)) for word in range(2, size + 1)]
        relations = ["root"] + rng.choice(["det", "nsubj", "punct"], size - 1).tolist()
        words = [f"w{word}" for word in rng.integers(0, 60, size)]
        sentences.append({"words": words, "heads": heads, "relns": relations})
    sentences.insert(3, {"words": ["w1"] * 40, "heads": [0] + [1] * 39, "relns": ["det"] * 40})  # too long
    sentences.append({"words": ["_", "_"], "heads": [2, 0], "relns": ["det", "root"]})  # blanked
    (path / "treebank.jsonl").write_text("".join(json.dumps(sentence) + "\n" for sentence in sentences))
    overrides = {"snapshots.every": 2, "snapshots.dtype": "fp32", "evaluation.treebank": str(path / "treebank.jsonl")}
    with single_thread():
        train(write_inputs(path), path / "run", overrides)
    (path / "blimp").mkdir()
    for name, pairs in (("b_set", 50), ("a_set", 80)):
        labels = {"UID": name, "field": f"field of {name}", "linguistics_term": "term"}
        lines = []
        for _ in range(pairs):
            good, bad = (" ".join(f"w{word}" for word in rng.integers(0, 60, 4)) for _ in range(2))
            lines.append(json.dumps({**labels, "sentence_good": good, "sentence_bad": bad}) + "\n")
        (path / "blimp" / f"{name}.jsonl").write_text("".join(lines))
    return path


def inputs_of(folder: Path, **more) -> Inputs:
    """Everything in `small_run`."""
    from megatron_sas.trajectory.measure import Inputs

    treebank, blimp = (str(folder / name) for name in ("treebank.jsonl", "blimp"))
    return Inputs.of(treebank=treebank, blimp=blimp, text=str(folder / "data1"), batch_tokens=200, **more)


@pytest.fixture(scope="session")
def run_inputs(small_run):
    """`inputs_of`."""
    return inputs_of(small_run)


def trajectory_options(folder: Path, source: Path, output: Path, *options) -> list[str]:
    """The arguments of tools/eval_trajectory.py for everything in `small_run`."""
    arguments = ["--treebank", folder / "treebank.jsonl", "--blimp", folder / "blimp", "--text", folder / "data1"]
    arguments += ["--output", output, "--batch-tokens", 200, "--device", "cpu", *options]
    return [str(argument) for argument in (source, *arguments)]


def measure(source: Path, inputs: Inputs, output: Path, **options) -> int:
    """`measure_models` on this machine's CPU."""
    from megatron_sas.trajectory.models import list_models
    from megatron_sas.trajectory.workers import measure_models

    return measure_models(source, list_models(source), inputs, output, device="cpu", **options)


@pytest.fixture(scope="session")
def measured_run(small_run):
    """The trajectory of the run, measured as a whole."""
    with single_thread():
        assert measure(small_run / "run", inputs_of(small_run), small_run / "measured") == 0
    return small_run / "measured"


@pytest.fixture
def numbered_models(small_run, tmp_path):
    """A folder of Hugging Face models, one of them broken."""
    path = tmp_path / "models"
    path.mkdir()
    for name, step in (("seed_3-step_0k", 0), ("seed_3-step_1k", 4), ("seed_3-step_20k", 6)):
        shutil.copytree(small_run / "run" / "snapshots" / f"step_{step:08d}", path / name)
        config = json.loads((path / name / "config.json").read_text())
        assert config.pop("megatron_sas_step") == step
        (path / name / "config.json").write_text(json.dumps(config))
    weights = path / "seed_3-step_1k" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return path


def without_clock(directory: Path) -> dict[str, str | bytes]:
    """Content of every file of a trajectory but for durations."""
    files = {}
    for path in sorted(directory.rglob("*")):
        if path.name == "point.json":
            point = json.loads(path.read_text())
            del point["seconds"]
            for name in ("seconds", "sentences_per_second"):
                del point["blimp"][name]
            files[str(path.relative_to(directory))] = json.dumps(point)
        elif path.is_file():
            files[str(path.relative_to(directory))] = path.read_bytes()
    return files
