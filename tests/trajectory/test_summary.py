"""The points of a trajectory taken together."""

from __future__ import annotations

import json

import numpy as np
from measured_run import STEPS

from megatron_sas.trajectory.points import read_points
from megatron_sas.trajectory.summary import heads_over_time, summary_table


def test_summary_and_heads_are_written_from_all_points(measured_run):
    lines = [line.split(",") for line in (measured_run / "summary.csv").read_text().splitlines()]
    points = {point["step"]: point for point in read_points(measured_run)}
    assert [int(line[0]) for line in lines[1:]] == STEPS
    row = dict(zip(lines[0], lines[-1], strict=True))
    assert float(row["uas"]) == points[6]["uas"]["uas"]
    assert float(row["sas_to_dependent"]) == points[6]["sas"]["to_dependent"]
    assert float(row["blimp_field of a_set"]) == points[6]["blimp"]["fields"]["field of a_set"]
    heads = json.loads((measured_run / "heads.json").read_text())
    assert heads["steps"] == STEPS
    for name, relation in heads["relations"].items():
        last = points[6]["uas"]["relations"][name]
        assert relation["accuracy"][-1] == last["accuracy"]
        assert [b[3] for b in relation["best"]] == [points[s]["uas"]["relations"][name]["accuracy"] for s in STEPS]


def test_a_head_serves_its_relation_since_it_stays_above_the_baseline():
    hits = {0: [[3, 1], [1, 0]], 10: [[1, 7], [1, 0]], 20: [[9, 3], [2, 0]], 30: [[2, 8], [1, 0]], 40: [[2, 9], [2, 0]]}
    points = []
    for step, (first, second) in hits.items():  # relation obj: heads 0 and 1 of one layer; relation det never above
        correct = [[[second], [[0, 0]]], [[first], [[0, 0]]]]
        rows = {
            name: {"count": 10, "baseline": 0.5, "baseline_offset": -1, "layer": 0, "direction": "dep->head"}
            | {"head": int(np.argmax(values)), "accuracy": max(values) / 10}
            for name, values in (("obj", first), ("det", second))
        }
        counts = {"relations": ["det", "obj"], "directions": ["dep->head", "head->dep"], "correct": correct}
        points.append({"step": step, "uas": {"relations": rows, "counts": counts}})
    relations = heads_over_time(points)["relations"]
    assert list(relations) == ["obj", "det"]
    assert (relations["obj"]["head"], relations["obj"]["since"]) == (1, 30)  # above at 10, but not at 20
    assert relations["obj"]["accuracy"] == [0.1, 0.7, 0.3, 0.8, 0.9]
    assert [entry[1] for entry in relations["obj"]["best"]] == [0, 1, 0, 1, 1]
    assert relations["det"]["since"] is None


def test_the_table_has_a_column_for_what_some_point_has_and_for_the_rows_of_tables():
    points = [
        {"step": 0, "blimp": {"blimp": 0.5, "fields": {"syntax": 0.25}}, "weight_norm": 2.0},
        {"step": 10, "blimp": {"blimp": 0.75, "fields": {"semantics": 1.0, "syntax": 0.5}}, "uas": {"uas": None}},
    ]
    header, *rows = [line.split(",") for line in summary_table(points).splitlines()]
    assert header == ["step", "blimp", "weight_norm", "blimp_semantics", "blimp_syntax"]
    assert rows == [["0", "0.5", "2.0", "", "0.25"], ["10", "0.75", "", "1.0", "0.5"]]
    assert summary_table([]) == "step\n"
