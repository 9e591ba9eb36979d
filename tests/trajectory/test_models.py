"""Which models make up a trajectory: of a run, of a branch of a run, and in a folder."""

from __future__ import annotations

import json

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


def test_a_folder_is_sorted_by_the_number_in_which_names_differ(tmp_path):
    names = ["seed_3-step_20k", "seed_3-step_0k", "seed_3-step_1500", "seed_3-step_2M"]
    folder = make_models(tmp_path / "models", names)
    (folder / "notes").mkdir()
    assert [(step, path.name) for step, path in list_models(folder)] == [
        (0, "seed_3-step_0k"),
        (1500, "seed_3-step_1500"),
        (20_000, "seed_3-step_20k"),
        (2_000_000, "seed_3-step_2M"),
    ]


def test_folders_whose_names_have_no_numbers_count_in_their_order_and_say_so(tmp_path):
    folder, lines = make_models(tmp_path / "models", ["tiny", "base"]), []
    assert [path.name for _, path in list_models(folder, report=lines.append)] == ["base", "tiny"]
    assert lines == [f"{folder}: no numbers in the names, so the models count in the order of their names"]


def test_a_single_model_needs_no_place_among_others(tmp_path):
    folder = make_models(tmp_path / "models", ["step_1e5"])
    assert list_models(folder / "step_1e5") == [(0, folder / "step_1e5")]


def test_two_phases_with_models_of_one_step_are_refused(tmp_path):
    folder = make_models(tmp_path / "models", ["stage1-step140000-tokens588B", "stage2-step0-tokens0B"])
    with pytest.raises(InputError, match=r"are both number 140000; .*give --step-pattern$"):
        list_models(folder)


def test_a_pattern_says_which_number_is_the_step(tmp_path):
    folder = make_models(tmp_path / "models", ["a_100_v2", "b_2k_v1", "final_3000"])
    found = list_models(folder, r"_(\d+k?)(?:_|$)")
    assert [(step, path.name) for step, path in found] == [(100, "a_100_v2"), (2000, "b_2k_v1"), (3000, "final_3000")]
    assert list_models(folder, r"(a|b|final)_(?P<step>\d+)")[0][0] == 2  # the unit belongs into the group
    assert list_models(folder / "a_100_v2", r"_(\d+)_") == [(100, folder / "a_100_v2")]
    for pattern, message in [
        ("(", r"'\(' is no regular expression"),
        (r"\d+", "has 0 groups; put the step into the only one"),
        (r"_(\d+)_", "b_2k_v1: --step-pattern .* does not find a step in it"),
        (r"_(\d+.?.?)", "a_100_v2: --step-pattern finds '100_v', which is no number"),
        (r"[a-z]+_.*(0|k)", "b_2k_v1: --step-pattern finds 'k', which is no number"),
    ]:
        with pytest.raises(InputError, match=message):
            list_models(folder, pattern)
    make_run(tmp_path / "run", snapshots=[0])
    with pytest.raises(InputError, match="run is a run, whose steps are known"):
        list_models(tmp_path / "run", r"(\d+)")


def test_recorded_steps_go_before_names(tmp_path):
    folder = make_models(tmp_path / "models", ["wiki-2", "wiki-1", "wiki-3"])
    for name, step in (("wiki-1", 500), ("wiki-2", 0), ("wiki-3", 20)):
        (folder / name / "config.json").write_text(json.dumps({"megatron_sas_step": step}))
    assert [(step, path.name) for step, path in list_models(folder)] == [(0, "wiki-2"), (20, "wiki-3"), (500, "wiki-1")]
    assert list_models(folder / "wiki-2") == [(0, folder / "wiki-2")]
    assert list_models(folder, r"wiki-(\d)")[0] == (1, folder / "wiki-1")
    make_models(folder, ["wiki-4"])
    with pytest.raises(InputError, match=r"wiki-1 records step 500, but would count as 1 by .*--step-pattern"):
        list_models(folder)


def test_one_model_is_a_trajectory_of_one_point(tmp_path):
    folder = make_models(tmp_path / "models", ["plain", "step_40"])
    assert list_models(folder / "plain") == [(0, folder / "plain")]
    assert list_models(folder / "step_40") == [(40, folder / "step_40")]


def test_ambiguous_and_empty_folders_are_refused(tmp_path):
    folder = make_models(tmp_path / "models", ["step_20k", "step_20000"])
    with pytest.raises(InputError, match="step_20000 and step_20k are both number 20000"):
        list_models(folder)
    (tmp_path / "empty").mkdir()
    for path, message in ((tmp_path / "empty", "no models in it"), (tmp_path / "none", "no such directory")):
        with pytest.raises(InputError, match=message):
            list_models(path)
