"""Measuring the models of a trajectory: restarted, killed, and with models that are broken."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path

import psutil
import pytest
from measured_run import STEPS, inputs_of, measure, trajectory_options, without_clock

from megatron_sas.core.cli import InputError
from megatron_sas.core.files import sha256_file
from megatron_sas.trajectory.points import is_whole, point_directory, read_point, read_points, read_settings
from megatron_sas.trajectory.workers import measuring_pool

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tools'}", "OMP_NUM_THREADS": "1"}

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_second_call_measures_what_is_missing_or_damaged_to_the_same_bytes(
    small_run, run_inputs, measured_run, tmp_path
):
    again = small_run / "again"  # next to `measured_run`: the settings hold the way to the run
    shutil.copytree(measured_run, again)
    shutil.rmtree(point_directory(again, 2))
    (point_directory(again, 4) / "items.npz").write_bytes(b"PK")
    (again / "summary.csv").unlink()
    kept = (point_directory(again, 3) / "point.json").stat()
    calls = []
    measure(small_run / "run", run_inputs, again, after_model=lambda: calls.append(1))
    assert len(calls) == len(STEPS)
    found = (point_directory(again, 3) / "point.json").stat()
    assert (found.st_ino, found.st_mtime_ns) == (kept.st_ino, kept.st_mtime_ns)
    assert without_clock(again) == without_clock(measured_run)
    with pytest.raises(InputError, match=r"settings.json: was measured with another treebank .* another --output"):
        measure(small_run / "run", inputs_of(small_run, treebank_sentences=9), again)


def test_a_point_of_other_weights_is_measured_again(numbered_models, run_inputs, tmp_path):
    """Two models change places: same names, steps and shape."""
    output = tmp_path / "out"
    shutil.rmtree(numbered_models / "seed_3-step_1k")
    measure(numbered_models, run_inputs, output)
    before = {step: read_point(output, step) for step in (0, 20_000)}
    for step, point in before.items():
        weights = numbered_models / f"seed_3-step_{step // 1000}k" / "model.safetensors"
        assert point["model_sha256"] == sha256_file(weights)
    (numbered_models / "seed_3-step_0k").rename(numbered_models / "other")
    (numbered_models / "seed_3-step_20k").rename(numbered_models / "seed_3-step_0k")
    (numbered_models / "other").rename(numbered_models / "seed_3-step_20k")
    measure(numbered_models, run_inputs, output)
    for step, other in ((0, 20_000), (20_000, 0)):
        point = read_point(output, step)
        assert point["model_sha256"] == before[other]["model_sha256"] != before[step]["model_sha256"]
        assert (point["weight_norm"], point["mlm_loss"]) == (before[other]["weight_norm"], before[other]["mlm_loss"])


def test_a_model_that_cannot_be_read_is_refused_or_skipped(numbered_models, run_inputs, tmp_path):
    output, lines = tmp_path / "out", []
    with pytest.raises(InputError, match=r"seed_3-step_1k/model.safetensors: is damaged .*--on-error skip"):
        measure(numbered_models, run_inputs, output)
    assert [is_whole(output, step) for step in (0, 1000, 20_000)] == [True, False, False]
    assert measure(numbered_models, run_inputs, output, on_error="skip", report=lines.append) == 1
    about_the_treebank, skipped = lines
    assert about_the_treebank.endswith("1 sentences left out, whose words are blanked (_)")
    assert skipped.startswith("skipped step 1000: ")
    assert [point["step"] for point in read_points(output)] == [0, 20_000]
    assert not point_directory(output, 1000).exists()
    assert read_settings(output)["source"] == "../models"


def test_a_broken_first_model_or_another_architecture_is_skipped_too(numbered_models, run_inputs, small_run, tmp_path):
    shutil.move(numbered_models / "seed_3-step_1k", numbered_models / "seed_3-step_0")
    shutil.rmtree(numbered_models / "seed_3-step_0k")
    config = json.loads((numbered_models / "seed_3-step_20k" / "config.json").read_text())
    other = numbered_models / "seed_3-step_30k"
    shutil.copytree(numbered_models / "seed_3-step_20k", other)
    (other / "config.json").write_text(json.dumps({**config, "num_attention_heads": 4}))
    impossible = numbered_models / "seed_3-step_40k"
    shutil.copytree(numbered_models / "seed_3-step_20k", impossible)
    (impossible / "config.json").write_text(json.dumps({**config, "hidden_size": "64"}))
    lines = []
    assert measure(numbered_models, run_inputs, tmp_path / "out", on_error="skip", report=lines.append) == 3
    skipped = [line for line in lines if line.startswith("skipped")]
    assert [line.partition(":")[0] for line in skipped] == [f"skipped step {step}" for step in (0, 30_000, 40_000)]
    assert "differs from the other models in num_heads" in skipped[1] and len(lines) == 4  # with one on the treebank
    assert [point["step"] for point in read_points(tmp_path / "out")] == [20_000]


HELD = """
import runpy, sys, time
from megatron_sas.trajectory import workers

def held(task, step, *arguments):
    if step == 6:
        time.sleep(600)
    return measure(task, step, *arguments)

measure, workers._measure = workers._measure, held  # in the workers, which import this file, too
if __name__ == "__main__":
    sys.argv.pop(0)
    runpy.run_path(sys.argv[0])["main"]()
"""


@pytest.mark.slow
def test_killed_with_two_workers_it_leaves_whole_points_and_continues(small_run, measured_run, run_inputs):
    output, script = small_run / "killed", small_run / "held.py"
    script.write_text(HELD)  # the command, which does not come to the end of the last model
    options = trajectory_options(small_run, small_run / "run", output, "--workers", 2)
    first = psutil.Popen([sys.executable, script, ROOT / "tools" / "eval_trajectory.py", *options], env=ENVIRONMENT)
    try:
        deadline = time.monotonic() + 180
        while not list(output.glob("points/step_*")):
            assert time.monotonic() < deadline and first.poll() is None
            time.sleep(0.002)
        workers = first.children()  # two, and the tracker of their resources
    finally:
        first.kill()
        first.wait()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert len(workers) == 3 and not alive, "a worker outlives its parent"
    assert all(is_whole(output, int(path.name[5:])) for path in output.glob("points/step_*"))
    assert not (output / "summary.csv").exists()

    with measuring_pool(2) as pool:
        measure(small_run / "run", run_inputs, output, pool=pool)
    assert without_clock(output) == without_clock(measured_run)
