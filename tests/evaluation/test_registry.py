"""The registry of evaluations: what a further one needs, and what the existing ones promise."""

from __future__ import annotations

import csv
import json

import pytest
from engine_runs import ROOT, launch, write_inputs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_sas.config import help_text
from megatron_sas.evaluation.live import EvaluationSection, evaluation_line
from megatron_sas.evaluation.registry import EVALUATIONS, live_metrics, snapshot_metrics
from megatron_sas.run.records import read_records

SCRIPT = ROOT / "tests" / "support" / "further_evaluation.py"


@pytest.fixture(scope="module")
def further(tmp_path_factory):
    """A run with one more evaluation, measured and reported: its directory, and all that was printed."""
    directory = tmp_path_factory.mktemp("further")
    printed = launch(SCRIPT, write_inputs(directory), directory, directory / "data1")
    return directory, printed


@pytest.mark.slow
def test_further_evaluation_is_recorded_printed_and_plotted(further):
    directory, printed = further
    records = [r for r in read_records(directory / "run" / "metrics.jsonl") if r["kind"] == "evaluation"]
    assert [record["step"] for record in records] == [0, 3, 6]
    assert all(f"  norm {record['hidden_norm']:.4f}  (" in printed for record in records)
    board = EventAccumulator(str(directory / "run" / "tensorboard")).Reload()
    values = [event.value for event in board.Scalars("evaluation/hidden_norm")]
    assert values == pytest.approx([record["hidden_norm"] for record in records])


@pytest.mark.slow
def test_further_evaluation_is_measured_on_snapshots_and_summarized(further):
    trajectory = further[0] / "run" / "trajectory"
    rows = list(csv.DictReader((trajectory / "summary.csv").open()))
    assert [int(row["step"]) for row in rows] == [0, 2, 3, 4, 6]
    point = json.loads((trajectory / "points" / "step_00000004" / "point.json").read_text())
    assert float(rows[3]["hidden_norm"]) == point["hidden_norm"] > 0


@pytest.mark.slow
def test_further_evaluation_is_in_the_report(further):
    report = further[0] / "report"
    (row,) = csv.DictReader((report / "table.csv").open())
    assert float(row["hidden_norm"]) > 0
    assert "Hidden norm" in (report / "table.md").read_text()
    assert "Hidden norm ↑" in (report / "report.html").read_text()
    assert "Hidden norm" in (report / "figures" / "trajectories.svg").read_text()
    assert "hidden_norm" in json.loads((report / "onsets.json").read_text())["runs"][0]


def test_every_setting_is_in_the_section_and_in_the_help():
    names = [name for owner in EVALUATIONS.values() for name in owner.settings.model_fields]
    assert len(set(names)) == len(names) and set(names) < EvaluationSection.model_fields.keys()
    assert all(f"  evaluation.{name} (" in help_text() for name in names)


@pytest.mark.parametrize("metrics", [live_metrics, snapshot_metrics])
def test_no_two_metrics_share_a_name(metrics):
    every = list(metrics())
    for names in ([m.key for m in every], [m.name for m in every], [m.column for m in every]):
        assert len(set(names)) == len(names)


def test_printed_line_names_what_was_measured_and_warns_of_ties():
    values = {"uas": 0.25, "blimp": 0.5, "blimp_ties": 6, "blimp_sets": {"a": {"num_pairs": 100}}, "twonn": 3.0}
    assert evaluation_line(values) == "uas 0.2500  blimp 0.5000 (warning: 6 ties count as wrong)"
    assert evaluation_line({**values, "blimp_ties": 5}) == "uas 0.2500  blimp 0.5000"
    assert evaluation_line({"weight_norm": 1.0, "seconds": 2.0}) == ""
