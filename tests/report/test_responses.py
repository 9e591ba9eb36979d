"""Results over λ and over the length of the suppression."""

import numpy as np
import pytest
from simulated_sweeps import simulate

from megatron_sas.report.comparisons import summarize
from megatron_sas.report.responses import mean_over_training, stage_responses, weight_response
from megatron_sas.report.trajectories import METRICS

UAS = METRICS[1]


def test_conditions_by_weight_and_by_stage_length():
    runs = simulate(np.random.default_rng(0), seeds=(1, 2))
    found = summarize(runs)
    syntax, controls = weight_response(found)
    assert [(point.x, point.condition.label) for point in syntax] == [(-0.02, "plus"), (0, "base"), (0.02, "minus")]
    assert [point.condition.label for point in controls] == ["permuted", "offset"]
    base = syntax[1]
    finals = [run.evaluations[-1]["uas"] for run in runs[:2]]
    assert base.values["uas"] == finals and base.final["uas"].mean == pytest.approx(np.mean(finals))
    (response,) = stage_responses(found)
    assert (response.weight, [point.x for point in response.points]) == (0.02, [200, 800])
    assert list(response.levels) == ["base", "minus"] and response.levels["base"] == base.final


def test_runs_that_do_not_reach_the_end_are_left_out():
    runs = simulate(np.random.default_rng(1), {"base": {}, "minus": {}}, seeds=(1, 2))
    del runs[0].evaluations[-3:]
    base = weight_response(summarize(runs))[0][0]
    assert base.values["uas"] == [runs[1].evaluations[-1]["uas"]] and base.area["uas"].count == 1


def test_the_lines_beside_stage_lengths_are_of_whole_runs():
    """Half of a sweep: a base that has just begun would make every release look good."""
    runs = simulate(np.random.default_rng(3), seeds=(1, 2))
    for run in runs:
        if run.label in ("base", "minus") and run.seed == 2:
            del run.evaluations[2:]
    (response,) = stage_responses(summarize(runs))
    for label in ("base", "minus"):
        (whole,) = (run for run in runs if run.label == label and run.seed == 1)
        assert response.levels[label]["loss"].count == 1
        assert response.levels[label]["loss"].mean == whole.evaluations[-1]["validation_mlm_loss"]


def test_area_under_the_curve_is_its_mean():
    (run,) = simulate(np.random.default_rng(2), {"base": {}}, seeds=(1,))
    run.evaluations[:] = [{"step": s, "uas": v} for s, v in ((0, 0.0), (10, 1.0), (30, 1.0), (40, 0.0))]
    assert mean_over_training(run, UAS) == pytest.approx((5 + 20 + 5) / 40)
    del run.evaluations[1:]
    assert mean_over_training(run, UAS) is None
