"""tools/eval_trajectory.py: its command line (measuring itself is tested in tests/trajectory/)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from measured_run import trajectory_options, without_clock
from tool_calls import call_tool

from megatron_sas.core.cli import InputError
from megatron_sas.export.hf import to_hf
from megatron_sas.trajectory.points import read_points

pytestmark = pytest.mark.usefixtures("one_thread")


def eval_trajectory(small_run, source, output, *options):
    call_tool("eval_trajectory", *trajectory_options(small_run, source, output, *options))


def test_the_command_measures_the_chosen_steps(small_run, measured_run, capsys):
    output = small_run / "chosen"
    eval_trajectory(small_run, small_run / "run", output, "--steps", 0, "3-5")
    *unknown, last = capsys.readouterr().out.splitlines()
    assert last == f"{output}: 3 models measured, 0 skipped"
    assert [line.split(" pieces of ")[1] for line in unknown] == [
        f"{name} are [UNK] (0.00%)" for name in ("--treebank", "--blimp", "--text")
    ]
    points = {name: content for name, content in without_clock(output).items() if name.startswith("points")}
    assert sorted({name.split("/")[1] for name in points}) == [f"step_{step:08d}" for step in (0, 3, 4)]
    assert points.items() <= without_clock(measured_run).items()


def test_a_pattern_reads_names_and_another_one_needs_another_output(small_run, numbered_models, tmp_path, capsys):
    shutil.rmtree(numbered_models / "seed_3-step_1k")
    (numbered_models / "seed_3-step_20k").rename(numbered_models / "seed_4-step_20k")
    output = tmp_path / "out"
    with pytest.raises(InputError, match=r"seed_3-step_0k and seed_4-step_20k.*--step-pattern"):
        eval_trajectory(small_run, numbered_models, output)
    eval_trajectory(small_run, numbered_models, output, "--step-pattern", r"step_(\d+k)")
    assert [point["step"] for point in read_points(output)] == [0, 20_000]
    with pytest.raises(InputError, match=r"seed_3-step_0k as step 0, which is step 3 now; choose another --output"):
        eval_trajectory(small_run, numbered_models, output, "--step-pattern", r"seed_(\d)")


def test_exports_count_as_the_steps_that_they_record(small_run, tmp_path, capsys):
    for name, step in (("second", 3), ("first", 6)):
        to_hf(small_run / "run" / "checkpoints" / f"step_{step:08d}", tmp_path / "models" / name)
    eval_trajectory(small_run, tmp_path / "models", tmp_path / "out")
    found = {point["step"]: Path(point["model"]).name for point in read_points(tmp_path / "out")}
    assert found == {3: "second", 6: "first"}


def test_wrong_input_is_refused_and_leaves_nothing(small_run):
    output = small_run / "none"
    for source, options, message in [
        (small_run / "run", ["--steps", "7-9"], "--steps: none of the models"),
        (small_run / "blimp", [], "blimp: no models in it"),
        (small_run / "run", ["--workers", 0], "--workers: 0 is below 1"),
        (small_run / "run", ["--text", small_run / "absent"], "absent.json: no such file"),
        (small_run / "run", ["--treebank", small_run / "absent.conllu"], "absent.conllu: no such file"),
    ]:
        with pytest.raises(InputError, match=message):
            eval_trajectory(small_run, source, output, *options)
        assert not output.exists()
