"""Runs read back as curves; labels, schedules and faults."""

import json
import shutil

import numpy as np
import pytest
import yaml
from synthetic_runs import write_run

from megatron_sas.core.cli import InputError
from megatron_sas.report.comparisons import summarize
from megatron_sas.report.figures.trajectories import draw
from megatron_sas.report.load import load_runs
from megatron_sas.report.trajectories import METRICS, group_by_condition

LOSS, UAS, BLIMP = METRICS


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Directories of a base run, a suppressed one and one released at step 200."""
    root = tmp_path_factory.mktemp("runs")
    write_run(root / "minus", weight=0.015)
    write_run(root / "base")
    write_run(root / "released", weight=0.015, release=200)
    return root


def change_schedule(run, stages):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["sas"]["schedule"] = stages
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def test_curves_are_the_records(runs):
    (run,) = load_runs([runs / "base"])
    curve = run.curve("uas")
    recorded = [json.loads(line) for line in (runs / "base" / "metrics.jsonl").read_text().splitlines()]
    expected = [(r["step"], r["uas"]) for r in recorded if r["kind"] == "evaluation"]
    np.testing.assert_array_equal(np.column_stack([curve.steps, curve.values]), expected)
    assert len(run.curve("mlm_loss", "train")) == 180
    assert len(run.curve("nothing")) == 0
    assert run.final_step == 900
    assert run.nested("uas_relations", first=True)["det"]["count"] == 1900
    assert run.nested("nothing") == {}


def test_missing_values_repeated_steps_and_order(tmp_path, runs):
    run = shutil.copytree(runs / "base", tmp_path / "run")
    lines = (
        '{"kind": "evaluation", "step": 50, "uas": 0.5}',
        '{"kind": "evaluation", "step": 25, "uas": null}',
        '{"kind": "evaluation", "step": 50, "uas": 0.6}',
        '{"kind": "evaluation", "step": 0, "uas": true}',
        '{"kind": "evaluation", "step": 0, "uas": 0.1}',
    )
    (run / "metrics.jsonl").write_text("\n".join(lines))
    curve = load_runs([run])[0].curve("uas")
    assert curve.steps.tolist() == [0, 50] and curve.values.tolist() == [0.1, 0.6]


def test_training_loss_stands_in_for_a_missing_validation_loss(tmp_path, runs):
    run = shutil.copytree(runs / "base", tmp_path / "run")
    lines = [
        {"kind": "evaluation", "step": 0, "uas": 0.1},
        *({"kind": "train", "step": s, "mlm_loss": float(s)} for s in range(1, 21)),
        {"kind": "evaluation", "step": 10, "uas": 0.1},
        {"kind": "evaluation", "step": 20, "uas": 0.1},
    ]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    curve = load_runs([run])[0].metric(LOSS)
    assert curve.steps.tolist() == [5.5, 15.5] and curve.values.tolist() == [5.5, 15.5]
    assert len(load_runs([run])[0].metric(BLIMP)) == 0


def test_weight_follows_the_schedule(runs):
    base, released = load_runs([runs / "base", runs / "released"])
    assert base.is_base and not base.weight("sas").values.any() and base.describe_schedule() == "0"
    assert not released.is_base
    weight = released.weight("sas")
    assert (weight.values[weight.steps < 200] == 0.015).all() and not weight.values[weight.steps >= 200].any()
    assert {199, 200} <= set(weight.steps)
    assert released.describe_schedule() == "0.015 in steps 0 to 200, then 0"


def test_a_run_with_another_term_is_other_and_names_it(runs, tmp_path):
    shutil.copytree(runs / "released", tmp_path / "two")
    path = tmp_path / "two" / "config.yaml"
    path.write_text(path.read_text() + "offset: {schedule: {kind: cosine, value: 0.5, decay_horizon: 300}}\n")
    (run,) = load_runs([tmp_path / "two"])
    assert (run.role, run.constant_weight, run.release_step, run.is_base) == ("other", None, None, False)
    words = "0.015 in steps 0 to 200, then 0; offset 0.5, linear warm-up over 0 updates, half a cosine down to 0"
    assert run.describe_schedule().startswith(words)
    assert run.weight("offset").values[0] == 0.5 and run.weight("sas").values[0] == 0.015
    figure = draw(summarize([run]), {run.path: {}})
    assert [axis.get_ylabel() for axis in figure.axes][:2] == ["λ", "λ offset"]
    path.write_text(path.read_text().replace("cosine", "wave"))
    with pytest.raises(InputError, match=r"offset\.schedule is not a list of stages or another schedule"):
        load_runs([tmp_path / "two"])[0].describe_schedule()


@pytest.mark.parametrize(
    "stages, text, is_base",
    [
        ([{"start": 0, "value": -0.01}], "−0.01", False),
        ([{"start": 100, "value": 0.5}], "0.5 from step 100", False),
        ([{"start": 0, "value": 0.0}], "0", True),
        ([{"start": 0, "value": 0.0, "end": 10, "end_value": 0.2}], "0 to 0.2 in steps 0 to 10, then 0", False),
        (
            [{"start": 0, "value": 0.1, "end": 5}, {"start": 5, "value": 0.2}],
            "0.1 in steps 0 to 5, 0.2 from step 5",
            False,
        ),
    ],
)
def test_schedules_in_words(tmp_path, runs, stages, text, is_base):
    run = shutil.copytree(runs / "base", tmp_path / "run")
    change_schedule(run, stages)
    (loaded,) = load_runs([run])
    assert (loaded.describe_schedule(), loaded.is_base) == (text, is_base)


def test_base_comes_first(runs):
    loaded = load_runs([runs / "minus", runs / "base", runs / "released"])
    assert list(group_by_condition(loaded)) == ["base", "minus", "released"]
    loaded = load_runs([runs / "minus", runs / "base", runs / "released"], ["a", "b", "a"])
    assert {label: len(group) for label, group in group_by_condition(loaded).items()} == {"b": 1, "a": 2}


def test_baseline_is_weighted_by_edges(runs):
    (run,) = load_runs([runs / "base"])
    relations = run.nested("uas_relations").values()
    edges = sum(r["count"] for r in relations)
    assert run.uas_baseline == pytest.approx(sum(r["baseline"] * r["count"] for r in relations) / edges)


def test_faults_are_one_line(tmp_path, runs):
    def fault(paths, labels=None):
        with pytest.raises(InputError) as caught:
            group_by_condition(load_runs(paths, labels))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "not a directory" in fault([tmp_path / "absent"])
    (tmp_path / "empty").mkdir()
    assert "metrics.jsonl: no such file" in fault([tmp_path / "empty"])
    assert "more than once" in fault([runs / "base", runs / "base"])
    assert "2 label(s) for 1 run(s)" in fault([runs / "base"], ["a", "b"])
    assert "with and without a SAS term" in fault([runs / "base", runs / "minus"], ["a", "a"])

    broken = shutil.copytree(runs / "base", tmp_path / "broken")
    for name, content, expected in [
        ("config.yaml", "a: [", "not a YAML configuration"),
        ("config.yaml", "- 1", "not a YAML configuration"),
        ("metrics.jsonl", '{"kind": "train", "step": 1}\n', "no evaluations"),
        ("metrics.jsonl", '{"kind"\n{"kind": "train", "step": 1}\n', "line 1"),
    ]:
        original = (broken / name).read_bytes()
        (broken / name).write_text(content)
        assert expected in fault([broken])
        (broken / name).write_bytes(original)
    change_schedule(broken, [{"from": 0}])
    assert "not a list of stages" in fault([broken])
    (broken / "config.yaml").unlink()
    assert "config.yaml: no such file" in fault([broken])
