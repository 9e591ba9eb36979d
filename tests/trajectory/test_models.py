"""Which models make up a trajectory: of a run, of a branch of a run, and in a folder."""

from __future__ import annotations

import json
import re

import pytest

from megatron_sas.core.cli import InputError
from megatron_sas.trajectory.models import list_models


def make_run(path, snapshots=(), checkpoints=(), parent=None, step=0):
    for kind, steps in (("snapshots", snapshots), ("checkpoints", checkpoints)):
        for number in steps:
            (path / kind / f"step_{number:08d}").mkdir(parents=True)
    if parent is not None:
        lineage = {"format": "megatron_sas lineage", "version": 1, "parent_run": parent, "step": step}
        (path / "lineage.json").write_text(json.dumps(lineage))
    return path


def found(path):
    return [(step, str(model.relative_to(path.parent))) for step, model in list_models(path)]


def test_a_run_has_snapshots_before_checkpoints_and_nothing_half_written(tmp_path):
    run = make_run(tmp_path / "run", snapshots=[0, 20, 100], checkpoints=[0, 50, 100])
    (run / "snapshots" / ".step_00000030.abc.tmp").mkdir()
    (run / "checkpoints" / "latest").write_text("step_00000100\n")
    assert found(run) == [
        (0, "run/snapshots/step_00000000"),
        (20, "run/snapshots/step_00000020"),
        (50, "run/checkpoints/step_00000050"),
        (100, "run/snapshots/step_00000100"),
    ]


def test_a_branch_has_its_ancestors_models_up_to_the_branch(tmp_path):
    make_run(tmp_path / "a", snapshots=[0, 10, 20, 30, 40], checkpoints=[40])
    make_run(tmp_path / "b", snapshots=[30, 35, 40], checkpoints=[20], parent="../a", step=20)
    branch = make_run(tmp_path / "c", checkpoints=[30, 50], parent=str(tmp_path / "b"), step=30)
    assert found(branch) == [
        (0, "a/snapshots/step_00000000"),
        (10, "a/snapshots/step_00000010"),
        (20, "a/snapshots/step_00000020"),
        (30, "b/snapshots/step_00000030"),
        (50, "c/checkpoints/step_00000050"),
    ]


def test_an_ancestor_counts_only_up_to_the_earliest_branch(tmp_path):
    make_run(tmp_path / "a", snapshots=[0, 10, 20])
    make_run(tmp_path / "b", snapshots=[20, 30], parent="../a", step=20)
    branch = make_run(tmp_path / "c", snapshots=[40], parent="../b", step=15)
    assert [step for step, _ in list_models(branch)] == [0, 10, 40]


def test_a_lineage_that_leads_nowhere_is_refused(tmp_path):
    orphan = make_run(tmp_path / "orphan", snapshots=[0], parent="../gone", step=3)
    with pytest.raises(InputError, match=r"lineage.json: the parent run .*gone is not there"):
        list_models(orphan)
    circle = make_run(tmp_path / "circle", snapshots=[0], parent=".", step=3)
    with pytest.raises(InputError, match="is also a descendant"):
        list_models(circle)
    (circle / "lineage.json").write_text("{}")
    with pytest.raises(InputError, match="is not a lineage that this program reads"):
        list_models(circle)


def make_models(folder, names):
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text("{}")
    return folder


def test_a_folder_is_sorted_by_the_last_number_of_a_name(tmp_path):
    names = ["seed_3-step_20k", "seed_3-step_0k", "seed_3-step_1500", "seed_3-step_2M"]
    folder = make_models(tmp_path / "models", names)
    (folder / "notes").mkdir()
    assert [(step, path.name) for step, path in list_models(folder)] == [
        (0, "seed_3-step_0k"),
        (1500, "seed_3-step_1500"),
        (20_000, "seed_3-step_20k"),
        (2_000_000, "seed_3-step_2M"),
    ]


def test_decimal_numbers_count_as_one(tmp_path):
    folder = make_models(
        tmp_path / "models", ["step_0.5M", "step_1.5M", "step_1.5k", "v1.2-step_2000", "step-3.0", "step.40"]
    )
    assert [step for step, _ in list_models(folder)] == [3, 40, 1500, 2000, 500_000, 1_500_000]


@pytest.mark.parametrize(
    "name", ["step_1e5", "step_1.5e+05", "ckpt-1,000", "ckpt-1.000", "ckpt-1,5k", "step_1.5", "step_1.0005k", "v1.2.3"]
)
def test_numbers_that_may_mean_something_else_are_refused(tmp_path, name):
    folder = make_models(tmp_path / "models", [name, "step_7"])
    with pytest.raises(InputError, match=rf"models/{re.escape(name)}: the last number in its name is no step"):
        list_models(folder)
    assert list_models(folder / name) == [(0, folder / name)]  # a single model needs no place among others


def test_without_numbers_the_order_of_names_counts(tmp_path):
    folder = make_models(tmp_path / "models", ["tiny", "base", "seed_7"])
    assert [(step, path.name) for step, path in list_models(folder)] == [(0, "base"), (1, "seed_7"), (2, "tiny")]


def test_one_model_is_a_trajectory_of_one_point(tmp_path):
    folder = make_models(tmp_path / "models", ["plain", "step_40"])
    assert list_models(folder / "plain") == [(0, folder / "plain")]
    assert list_models(folder / "step_40") == [(40, folder / "step_40")]


def test_ambiguous_and_empty_folders_are_refused(tmp_path):
    folder = make_models(tmp_path / "models", ["seed_0-step_20k", "seed_1-step_20k"])
    with pytest.raises(InputError, match="seed_0-step_20k and seed_1-step_20k are both number 20000"):
        list_models(folder)
    (tmp_path / "empty").mkdir()
    for path, message in ((tmp_path / "empty", "no models in it"), (tmp_path / "none", "no such directory")):
        with pytest.raises(InputError, match=message):
            list_models(path)
