"""Sweeps, measured trajectories and GLUE results on disk."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from synthetic_runs import write_glue, write_run, write_sweep
from trajectory_files import RELATIONS, write_trajectory

from megatron_sas.config import load_config
from megatron_sas.core.cli import InputError
from megatron_sas.report.analyse import Analysis
from megatron_sas.report.comparisons import whole_runs
from megatron_sas.report.load import read_inputs, sweep_title
from megatron_sas.report.report import Picture, report_html
from megatron_sas.report.run_onsets import find_onsets
from megatron_sas.report.trajectories import GLUE, METRICS

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


def rewrite_evaluations(run, change):
    """Apply `change` to the values of every evaluation line of a run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "evaluation":
            change(line)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_values_that_are_not_finite_change_nothing_but_the_number_of_points_and_are_reported(tmp_path):
    write_run(tmp_path / "run", every=25)
    shutil.copytree(tmp_path / "run", tmp_path / "broken")
    shutil.copytree(tmp_path / "run", tmp_path / "without")
    hit = (100, 500)
    rewrite_evaluations(tmp_path / "broken", lambda line: line.update({"uas": None} if line["step"] in hit else {}))
    rewrite_evaluations(tmp_path / "without", lambda line: line["step"] in hit and line.pop("uas"))
    (broken,), notes = read_inputs([tmp_path / "broken"])
    assert notes == ["uas: evaluations without a finite value are left out of the curves: broken (broken) 2."]
    (without,), notes = read_inputs([tmp_path / "without"])
    assert notes == []
    found = [find_onsets([run], 90)[run.path]["uas"] for run in (broken, without)]
    assert found[0] == found[1] and found[0].strongest.step is not None and found[0].change.step is not None
    assert len(broken.metric(UAS)) == len(broken.metric(BLIMP)) - 2


def test_blimp_has_four_fields_though_old_records_have_five(tmp_path):
    sets = {f"set_{number}": {"accuracy": 0.5, "num_pairs": 10} for number in range(67)}
    fields = {"morphology": 0.9, "semantics": 0.6, "syntax": 0.7, "syntax/semantics": 0.2, "syntax_semantics": 0.8}
    write_run(tmp_path / "run", every=100)
    rewrite_evaluations(tmp_path / "run", lambda line: line.update(blimp_fields=fields, blimp_sets=sets))
    (run,), notes = read_inputs([tmp_path / "run"])
    merged = (13 * 0.8 + 0.2) / 14
    assert run.nested("blimp_fields") == {**dict(list(fields.items())[:3]), "syntax_semantics": pytest.approx(merged)}
    assert notes == []
    del sets["set_0"]
    rewrite_evaluations(tmp_path / "run", lambda line: line.update(blimp_sets=sets))
    (run,), notes = read_inputs([tmp_path / "run"])
    assert list(run.nested("blimp_fields")) == ["morphology", "semantics", "syntax"]
    assert len(notes) == 1 and notes[0].startswith("blimp: fields that were recorded under two names are left out")


def test_models_that_end_with_many_ties_are_named(tmp_path):
    write_run(tmp_path / "run", every=100)
    sets = {"a": {"accuracy": 0.1, "num_pairs": 100, "ties": 6}}
    rewrite_evaluations(tmp_path / "run", lambda line: line.update(blimp_ties=5, blimp_sets=sets))
    assert read_inputs([tmp_path / "run"])[1] == []
    rewrite_evaluations(tmp_path / "run", lambda line: line.update(blimp_ties=6))
    expected = "blimp: models end with many ties, which count as wrong: run (run) 6 of 100."
    assert read_inputs([tmp_path / "run"])[1] == [expected]


def test_a_sweep_alone_gives_the_report_its_title(sweep, tmp_path):
    assert sweep_title([sweep]) == "a sweep"
    assert sweep_title([sweep, sweep / "base" / "seed-1"]) is None
    assert sweep_title([sweep / "base" / "seed-1"]) is None
    runs, _ = read_inputs([sweep])
    pictures = {"trajectories": Picture("", 100)}
    for title, expected in (("of <SAS> & loss", "of &lt;SAS&gt; &amp; loss"), (None, "Syntactic attention over")):
        page = report_html(Analysis(runs[:1], 90, replicates=0, title=title), pictures)
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


def test_the_training_loss_stands_for_all_runs_or_none(sweep, tmp_path):
    """One run without a loss on held-out text has none; its training loss is not compared with the others'."""
    other = shutil.copytree(sweep, tmp_path / "sweep")

    def forget(run):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            line.pop("validation_mlm_loss", None)
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    forget(other / "minus" / "seed-2")
    runs, notes = read_inputs([other])
    assert [len(run.metric(LOSS)) for run in runs] == [10, 10, 10, 0]
    assert "MLM loss was not evaluated in minus/seed-2." in Analysis(runs, 90, replicates=0).notes
    assert not any("training" in note for note in notes)
    for run in other.glob("*/seed-*"):
        forget(run)
    runs, notes = read_inputs([other])
    assert all(len(run.metric(LOSS)) > 9 for run in runs)
    assert notes[-1].startswith("No run has a loss on held-out text: the loss is that of training")


def change_items(run, since, until=10_000):
    """A treebank and sets of half the size in some of a run's live evaluations."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "evaluation":
            line["blimp_sets"] = {name: {"accuracy": 0.9, "num_pairs": 100} for name in line["blimp_sets"]}
        if line["kind"] == "evaluation" and since <= line["step"] < until:
            for row in line["uas_relations"].values():
                row["count"] //= 2
            for row in line["blimp_sets"].values():
                row["num_pairs"] = 50
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_live_evaluations_on_other_items_are_no_curve(tmp_path):
    """`evaluation` may change on the way, and a branch starts with its parent's records."""
    paths = [write_run(tmp_path / f"run-{seed}", seed=seed, every=100) for seed in range(3)]
    change_items(paths[0], 10_000)
    change_items(paths[1], 0, 400)
    change_items(paths[2], 0)
    runs, notes = read_inputs(paths)
    for metric in (UAS, BLIMP):
        assert [len(run.metric(metric)) for run in runs] == [10, 6, 0]
    assert runs[1].metric(UAS).steps[0] == 400 and all(len(run.metric(LOSS)) == 10 for run in runs)
    assert runs[1].nested("uas_relations", first=True) == {} == runs[2].nested("uas_relations")
    first = "uas: live evaluations of 1 of 3 runs "
    assert notes[:2] == [
        first + "changed to other items on the way, so their earlier values are left out: run-1 (run-1).",
        first + "are of other items than those of the rest, so their values are left out: run-2 (run-2).",
    ]
    assert len(notes) == 4
    (run,), notes = read_inputs(paths[1:2])
    assert len(run.metric(UAS)) == 6 and notes[0].startswith("uas: live evaluations of 1 of 1 runs changed")
    assert read_inputs(paths[2:])[1] == []


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
    assert len(notes) == (2 if "precision" not in change else 4)  # the last: the loss is that of training


EVERY_50 = {*range(0, 901, 50)}
DENSE_EARLY = {*range(0, 301, 10), *range(300, 901, 100)}


@pytest.mark.parametrize(
    ("live", "measured", "used"),
    [
        (EVERY_50, EVERY_50, True),
        (EVERY_50, {*range(25, 901, 50)}, True),  # between them
        (EVERY_50, EVERY_50 - {450}, True),  # one is missing
        (EVERY_50, EVERY_50 - {450, 500}, False),
        (EVERY_50, {*range(0, 901, 100)}, False),
        ({*range(0, 901, 100)}, EVERY_50, True),
        (DENSE_EARLY, DENSE_EARLY | EVERY_50, True),
        (DENSE_EARLY, {*range(0, 101, 10), *range(100, 901, 25)}, False),  # more over the whole run, but not early
    ],
)
def test_measured_snapshots_replace_evaluations_where_nowhere_sparser(tmp_path, live, measured, used):
    run = write_run(tmp_path / "run", every=10)
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(r) + "\n" for r in lines if r["kind"] != "evaluation" or r["step"] in live))
    write_trajectory(run, steps=sorted(measured))
    (loaded,), notes = read_inputs([run])
    for metric in (UAS, BLIMP):
        assert loaded.metric(metric).steps.tolist() == sorted(measured if used else live)
    assert loaded.curve("twonn").steps.tolist() == sorted(measured)  # not evaluated live
    assert len(notes) == (0 if used else 2)
    assert all("everywhere as densely as live evaluations" in note for note in notes)


@pytest.mark.parametrize("name", ["paper-base.yaml", "experiments/mini-run.yaml", "experiments/toy-run.yaml"])
def test_the_experiments_save_models_wherever_they_evaluate(name):
    """Or what is measured of them afterwards would not become their curves."""
    config = load_config(Path(__file__).parents[2] / "examples" / name)
    last = config.train.steps
    assert [s for s in range(last + 1) if config.evaluation.due(s, last) and not config.snapshots.due(s, last)] == []


def test_onset_intervals_hold_the_truth_and_order_is_told(sweep):
    runs, notes = read_inputs([sweep])
    analysis = Analysis(runs, 90, replicates=100, notes=notes)
    for seed, run in enumerate(analysis.runs[:2], start=1):
        onsets = analysis.onsets[run.path]
        low, high = onsets["uas"].interval
        assert low - 25 <= 400 + 20 * seed <= high + 25 and high - low <= 150  # evaluations are 50 steps apart
        assert low <= onsets["uas"].strongest.step <= high
        low, high = onsets["blimp"].interval
        assert low - 25 <= 500 + 20 * seed <= high + 25
        assert onsets["loss"].interval is None  # it has no items; its change point is another estimate
    order = analysis.orders["base"]
    assert order.items[0] > 0 and [run.share(1) > 0.95 for run in order.runs] == [True, True]
    assert sum(order.runs[0].share(sign) for sign in (-1, 0, 1)) == pytest.approx(1)
    assert list(analysis.orders) == ["base"]
    assert analysis.notes[0] == notes[0]
    assert analysis.with_items == analysis.runs[:2]  # the others never bend
    again = Analysis(runs, 90, replicates=100)
    for run in analysis.with_items:
        for name in ("uas", "blimp"):
            first, second = (a.onsets[run.path][name].items for a in (analysis, again))
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
    write_glue(runs[0], cola=0.4, sst2=0.8)
    write_glue(runs[0], step=500, wnli=0.0)
    write_glue(runs[1], cola=0.4, sst2=0.8)
    write_glue(runs[2], wnli=0.5)
    loaded, notes = read_inputs(runs)
    assert [run.final(GLUE) for run in loaded] == [pytest.approx(0.6), pytest.approx(0.6), None]
    assert notes == []


def test_glue_is_of_the_final_model(tmp_path):
    """A run that went on after it was fine-tuned, or whose step the result does not know, has no final value."""
    runs = [write_run(tmp_path / f"base-{seed}", seed=seed, every=100) for seed in range(3)]
    write_glue(runs[0], cola=0.4, sst2=0.8)
    write_glue(runs[1], step=500, cola=0.1, sst2=0.1)
    write_glue(runs[2], step=None, cola=0.1)
    loaded, notes = read_inputs(runs)
    assert [run.final(GLUE) for run in loaded] == [pytest.approx(0.6), None, None]
    assert notes == [
        "GLUE: 3 of 5 results are not known to be of their run's last step, so they are left out: "
        "base-1 (base-1) cola, base-1 (base-1) sst2, base-2 (base-2) cola."
    ]
    assert notes[0] in Analysis(loaded, 90, replicates=0, notes=notes).notes


@pytest.mark.parametrize("change", [{"epochs": 10}, {"sha256": "h"}, {"seeds": (1,)}])
def test_glue_is_made_in_one_way(tmp_path, change):
    """Where the data lie does not matter; what they are, settings and seeds do."""
    runs = [write_run(tmp_path / f"base-{seed}", seed=seed, every=100) for seed in range(3)]
    write_glue(runs[0], **change, cola=0.9)
    write_glue(runs[0], sst2=0.9)
    write_glue(runs[1], cola=0.4, sst2=0.8)
    write_glue(runs[2], cola=0.6, sst2=0.8)
    write_glue(runs[2], step=500, mrpc=0.5)
    loaded, notes = read_inputs(runs[1:])
    assert [run.final(GLUE) for run in loaded] == [pytest.approx(0.6), pytest.approx(0.7)] and len(notes) == 1
    loaded, notes = read_inputs(runs)
    assert [run.final(GLUE) for run in loaded] == [pytest.approx(0.9), pytest.approx(0.8), pytest.approx(0.8)]
    assert notes[1:] == [
        "GLUE: 1 of 6 results were made on other data, or with other settings or seeds, than the rest, so they are "
        "left out: base-0 (base-0) cola.",
        "GLUE is the mean over the tasks that all runs with GLUE have: sst2.",
    ]


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
    Analysis([loaded], 90, replicates=10)


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
    for content in ('{"format": "x"}', '{"format": "megatron_sas glue", "mean": 0.5, "data": null}'):
        (run / "glue" / "cola.json").write_text(content)
        assert "finetune_glue" in fault([run])


def test_glue_of_a_run_that_ended_early_is_not_compared(tmp_path):
    """Its result is of its own last step, half as far as the others'."""
    for name, steps in (("base-1", 900), ("base-2", 450)):
        write_run(tmp_path / name, steps=steps)
        write_glue(tmp_path / name, step=steps, cola=0.5)
    runs, _ = read_inputs([tmp_path / "base-1", tmp_path / "base-2"])
    assert all(run.measured.glue for run in runs)
    assert whole_runs(runs, GLUE) == {runs[0].path}
