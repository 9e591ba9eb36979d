"""The registry of evaluations: what the entries promise. tests/test_extending.py adds one."""

from __future__ import annotations

import pytest

from megatron_sas.config import help_text
from megatron_sas.evaluation.live import EvaluationSection, evaluation_line
from megatron_sas.evaluation.registry import EVALUATIONS, live_metrics, snapshot_metrics


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
