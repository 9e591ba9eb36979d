"""Sweeps, measured trajectories and GLUE results on disk."""

import json
import shutil

import numpy as np
import pytest
from synthetic_runs import write_glue, write_run, write_sweep
from trajectory_files import RELATIONS, write_trajectory

from megatron_sas.analysis.analyse import analyse
from megatron_sas.analysis.loading import load_runs, read_inputs, sweep_title
from megatron_sas.analysis.report import Picture, report_html
from megatron_sas.analysis.trajectories import GLUE, METRICS
from megatron_sas.cli import InputError

LOSS, UAS, BLIMP = METRICS


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Two seeds of base and of a suppressed condition, measured, and a run that has not begun."""
    root = tmp_path_factory.mktemp("sweep")
    for seed in (1, 2):
        write_run(root / "base" / f"seed-{seed}", seed=seed, every=100)
        write_run(root / "minus" / f"seed-{seed}", seed=seed, every=100, weight=0.02, uas_gain=0, blimp_gain=0)
        write_trajectory(root / "base" / f"seed-{seed}", onset=400 + 20 * seed)
        write_trajectory(root / "minus" / f"seed-{seed}", onset=5000)
    write_sweep(root, {"base": "base", "minus": "suppress", "plus": "promote"}, seeds=(1, 2))
    return root


def fault(paths, labels=None):
    with pytest.raises(InputError) as caught:
        read_inputs(paths, labels)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_sweep_is_its_runs(sweep):
    runs, notes = read_inputs([sweep])
    assert [(run.label, run.seed, run.role) for run in runs] == [
        ("base", 1, "base"),
        ("base", 2, "base"),
        ("minus", 1, "suppress"),
        ("minus", 2, "suppress"),
    ]
    assert notes == ["2 of 6 runs have no evaluation yet, so are left out: plus/seed-1, plus/seed-2."]


def test_a_sweep_alone_gives_the_report_its_title(sweep, tmp_path):
    assert sweep_title([sweep]) == "a sweep"
    assert sweep_title([sweep, sweep / "base" / "seed-1"]) is None
    assert sweep_title([sweep / "base" / "seed-1"]) is None
    runs, _ = read_inputs([sweep])
    pictures = {"trajectories": Picture("trajectories", "curves", "", 100)}
    for title, expected in (("of <SAS> & loss", "of &lt;SAS&gt; &amp; loss"), (None, "Syntactic attention over")):
        page = report_html(analyse(runs[:1], 90, replicates=0, title=title), pictures)
        assert f"<title>{expected}" in page and f"<h1>{expected}" in page


def test_measured_points_are_the_curves(sweep):
    runs, _ = read_inputs([sweep])
    points = sorted((runs[0].path / "trajectory" / "points").glob("*/point.json"))
    values = [json.loads(path.read_text()) for path in points]
    for metric in (UAS, BLIMP):
        curve = runs[0].metric(metric)
        assert curve.steps.tolist() == [value["step"] for value in values]
        assert curve.values.tolist() == [value[metric.name][metric.name] for value in values]
    assert runs[0].curve("twonn").values.tolist() == [v["intrinsic_dimension"]["twonn"] for v in values]
    assert len(runs[0].metric(LOSS)) == 10  # not measured along the trajectory, so live
    assert runs[0].item_metrics == {"uas", "blimp"}
    assert runs[0].nested("uas_relations").keys() == set(RELATIONS)
    assert runs[0].measured.head_counts[900].shape == (5, 2, 2, 4)


def test_sources_are_not_mixed(sweep, tmp_path):
    """If one run is not measured, or measured on something else, live evaluations serve all, and a note says so."""
    other = shutil.copytree(sweep, tmp_path / "sweep")
    shutil.rmtree(other / "minus" / "seed-2" / "trajectory")
    runs, notes = read_inputs([other])
    assert all(len(run.metric(UAS)) == 10 and not run.item_metrics for run in runs)
    assert sum("live evaluations are used instead" in note for note in notes) == 2
    assert all("3 of 4 runs" in note for note in notes[1:])
    shutil.copytree(sweep / "minus" / "seed-2" / "trajectory", other / "minus" / "seed-2" / "trajectory")
    settings = other / "minus" / "seed-2" / "trajectory" / "settings.json"
    settings.write_text(settings.read_text().replace('"sha256": "t"', '"sha256": "u"'))
    runs, _ = read_inputs([other])
    assert {len(run.metric(UAS)) for run in runs} == {10} and {len(run.metric(BLIMP)) for run in runs} == {19}
    assert {run.item_metrics for run in runs} == {frozenset({"blimp"})}


def test_the_intrinsic_dimension_has_one_source(sweep, tmp_path):
    """Live values at other steps and on other text do not enter a measured curve."""
    other = shutil.copytree(sweep, tmp_path / "sweep")
    for metrics in other.glob("*/seed-*/metrics.jsonl"):
        live = {"kind": "evaluation", "twonn": 3.0, "twonn_standard_error": 0.5}
        lines = [json.dumps({**live, "step": step}) + "\n" for step in (25, 475, 900)]
        metrics.write_text(metrics.read_text() + "".join(lines))
    run = read_inputs([other])[0][0]
    assert len(run.curve("twonn")) == 19 and 3.0 not in run.curve("twonn").values
    assert set(run.curve("twonn_standard_error").values) == {0.1}
    shutil.rmtree(other / "minus" / "seed-2" / "trajectory")
    runs, notes = read_inputs([other])
    assert [run.curve("twonn").steps.tolist() for run in runs] == [[25, 475, 900]] * 4
    assert set(runs[0].curve("twonn_standard_error").values) == {0.5}
    assert any("3 of 4 runs have measured snapshots with twonn" in note for note in notes)


@pytest.mark.parametrize("change", ['"sha256": "u"', '"sha256": "t"}, "precision": "bf16", "more": {"x": "y"'])
def test_runs_measured_in_another_way_are_left_out(tmp_path, change):
    """Without live evaluations too, only what was measured on the same data and in the same precision is compared."""
    paths = []
    for seed in range(3):
        paths.append(write_run(tmp_path / f"base-{seed}", seed=seed, every=2000))
        metrics = paths[-1] / "metrics.jsonl"
        lines = [line for line in metrics.read_text().splitlines(True) if '"kind": "evaluation"' not in line]
        metrics.write_text("".join(lines))
        write_trajectory(paths[-1])
    settings = paths[0] / "trajectory" / "settings.json"
    settings.write_text(settings.read_text().replace('"sha256": "t"', change))
    runs, notes = read_inputs(paths)
    assert [len(run.metric(UAS)) for run in runs] == [0, 19, 19]
    assert [run.nested("uas_relations") == {} for run in runs] == [True, False, False]
    assert ["uas" in run.item_metrics for run in runs] == [False, True, True]
    expected = "uas: 1 of 3 runs were measured on other data or in another precision than the rest"
    assert expected in notes[0] and "base-0" in notes[0]
    assert len(notes) == (1 if "precision" not in change else 3)


def test_a_few_measured_snapshots_do_not_replace_dense_evaluations(tmp_path):
    run = write_run(tmp_path / "run", every=50)  # 19 evaluations
    write_trajectory(run, steps=range(0, 901, 100))
    assert len(read_inputs([run])[0][0].metric(UAS)) == 10
    shutil.rmtree(run / "trajectory")
    write_trajectory(run, steps=range(0, 901, 300))
    (loaded,), notes = read_inputs([run])
    assert len(loaded.metric(UAS)) == 19 and len(loaded.curve("twonn")) == 4
    assert "half as densely" in notes[0]


def test_onset_intervals_hold_the_truth_and_order_is_told(sweep):
    runs, notes = read_inputs([sweep])
    analysis = analyse(runs, 90, replicates=100, notes=notes)
    for seed, run in enumerate(analysis.runs[:2], start=1):
        onsets = analysis.onsets[str(run.path)]
        assert onsets["uas"].interval_kind == "bootstrap interval over items"
        low, high = onsets["uas"].interval
        assert low - 25 <= 400 + 20 * seed <= high + 25 and high - low <= 150  # evaluations are 50 steps apart
        assert low <= onsets["uas"].bend.step <= high
        low, high = onsets["blimp"].interval
        assert low - 25 <= 500 + 20 * seed <= high + 25
        assert onsets["loss"].items is None and onsets["loss"].interval_kind == "change-point interval"
    order = analysis.orders["base"]
    assert order.items[0] > 0 and [run.share(1) > 0.95 for run in order.runs] == [True, True]
    assert sum(order.runs[0].share(sign) for sign in (-1, 0, 1)) == pytest.approx(1)
    assert analysis.orders["minus"] is None
    assert analysis.notes[0] == notes[0]
    assert analysis.with_items == analysis.runs[:2]  # the others never bend
    again = analyse(runs, 90, replicates=100)
    for run in analysis.with_items:
        for name in ("uas", "blimp"):
            first, second = (a.onsets[str(run.path)][name].items for a in (analysis, again))
            np.testing.assert_array_equal(first.steps, second.steps)


def test_glue_is_the_mean_over_common_tasks(tmp_path):
    runs = [write_run(tmp_path / f"base-{seed}", seed=seed, every=100) for seed in range(3)]
    write_glue(runs[0], cola=0.4, sst2=0.8)
    write_glue(runs[1], cola=0.6, sst2=0.9, mrpc=0.1)
    loaded, notes = read_inputs(runs)
    assert [run.final(GLUE) for run in loaded] == [pytest.approx(0.6), pytest.approx(0.75), None]
    assert notes == ["GLUE is the mean over the tasks that all runs with GLUE have: cola, sst2."]


def test_glue_leaves_wnli_out(tmp_path):
    """As tools/finetune_glue.py does; a run that has it is no different from one that has not."""
    runs = [write_run(tmp_path / f"base-{seed}", seed=seed, every=100) for seed in range(3)]
    write_glue(runs[0], cola=0.4, sst2=0.8, wnli=0.0)
    write_glue(runs[1], cola=0.4, sst2=0.8)
    write_glue(runs[2], wnli=0.5)
    loaded, notes = read_inputs(runs)
    assert [run.final(GLUE) for run in loaded] == [pytest.approx(0.6), pytest.approx(0.6), None]
    assert load_runs(runs[:1])[0].final(GLUE) == pytest.approx(0.6)
    assert notes == []


def test_values_that_are_not_numbers_are_left_out(sweep, tmp_path):
    run = shutil.copytree(sweep / "base" / "seed-1", tmp_path / "run")
    path = run / "trajectory" / "points" / "step_00000400" / "point.json"
    point = json.loads(path.read_text())
    point["uas"]["uas"] = None
    point["intrinsic_dimension"]["twonn"] = float("nan")
    del point["blimp"]
    path.write_text(json.dumps(point))
    (loaded,), _ = read_inputs([run])
    assert 400 not in loaded.metric(UAS).steps and 400 not in loaded.metric(BLIMP).steps
    assert 400 not in loaded.curve("twonn").steps
    analyse([loaded], 90, replicates=10)


def test_faults_are_one_line(sweep, tmp_path):
    assert "leave --labels out" in fault([sweep], ["a"])
    assert "more than once" in fault([sweep, sweep / "base" / "seed-1"])
    broken = tmp_path / "broken"
    broken.mkdir()
    for content, expected in [
        ("[]", "not a JSON object"),
        ("{", "not a JSON object"),
        ('{"format": "other"}', "not a sweep of version 1"),
        (
            '{"format": "megatron_sas sweep", "version": 1, "runs": [{"seed": 1}]}',
            "without directory, condition or seed",
        ),
        ('{"format": "megatron_sas sweep", "version": 1, "runs": []}', "none of its 0 run(s)"),
    ]:
        (broken / "sweep.json").write_text(content)
        assert expected in fault([broken])
    write_sweep(broken, {"base": "wrong"}, seeds=(1,))
    assert "role 'wrong'" in fault([broken])
    run = shutil.copytree(sweep / "base" / "seed-1", tmp_path / "run")
    point = run / "trajectory" / "points" / "step_00000400" / "point.json"
    point.write_text("{}")
    assert "point.json: is of step None" in fault([run])
    point.write_text("{")
    assert "point.json: does not hold a JSON object" in fault([run])
    shutil.rmtree(run / "trajectory")
    (run / "glue").mkdir()
    (run / "glue" / "cola.json").write_text('{"format": "x"}')
    assert "finetune_glue" in fault([run])
