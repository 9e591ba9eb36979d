"""Verdicts on sweeps whose answers are known, and on sweeps in which there is nothing to find."""

from dataclasses import replace

import numpy as np
import pytest
from simulated_sweeps import CONDITIONS, simulate

from megatron_sas.report.claims import NOT_SHOWN, NOT_TESTABLE, OPPOSITE, SHOWN, Claim, Part, answer_claims
from megatron_sas.report.comparisons import summarize
from megatron_sas.report.run_onsets import find_onsets, mean_distance, order_of
from megatron_sas.report.trajectories import METRICS

DELTA = 160
EFFECTS = {
    "base": {},
    "minus": {"loss": 1.0, "uas": -0.35, "blimp": -0.3},
    "plus": {"loss": 1.0, "uas": 0.1, "blimp": -0.1},
    "early": {"loss": -1.0},
    "late": {"loss": 1.0},
    "permuted": {"loss": 0.5},
    "offset": {},
}


def answer(runs):
    return answer_claims(summarize(runs), find_onsets(runs, DELTA), DELTA)


def verdicts(claim):
    return [part.verdict for part in claim.parts]


def test_known_effects_are_shown():
    claims = answer(simulate(np.random.default_rng(0), EFFECTS, seeds=range(5), twonn=3.0))
    assert [claim.verdict for claim in claims[:3]] == [SHOWN] * 3 and claims[4].verdict == SHOWN
    assert [len(claim.parts) for claim in claims] == [2, 3, 3, 3, 1]
    assert not any("{" in part.rule + part.missing for claim in claims for part in claim.parts)
    assert verdicts(claims[2]) == [SHOWN, SHOWN, SHOWN]
    assert verdicts(claims[3]) == [SHOWN, SHOWN, NOT_SHOWN]  # the suppressed run breaks when the base does
    assert claims[3].verdict == NOT_SHOWN
    evidence = " ".join(claims[1].parts[1].evidence)
    assert "UAS is first in 5, last in 0 runs" in evidence


def test_opposite_effects_are_opposite():
    effects = {name: {key: -value for key, value in effect.items()} for name, effect in EFFECTS.items()}
    effects["minus"]["uas"] = -0.35  # suppression works, but helps
    effects["early"] = {"loss": 1.0}
    effects["late"] = {"loss": 1.0}
    claims = answer(simulate(np.random.default_rng(1), effects, seeds=range(5), lag=-160))
    assert verdicts(claims[1])[1] == OPPOSITE and claims[1].verdict == OPPOSITE
    assert verdicts(claims[2])[:2] == [OPPOSITE, OPPOSITE] and claims[2].verdict == OPPOSITE
    assert claims[3].verdict == OPPOSITE


def test_an_effect_that_controls_share_is_not_syntax():
    shared = {**EFFECTS, "permuted": EFFECTS["minus"]}
    claim = answer(simulate(np.random.default_rng(2), shared, seeds=range(5)))[2]
    assert verdicts(claim) == [SHOWN, SHOWN, NOT_SHOWN] and claim.verdict == NOT_SHOWN
    without = {name: EFFECTS[name] for name in ("base", "minus", "plus")}
    claim = answer(simulate(np.random.default_rng(2), without, seeds=range(5)))[2]
    assert verdicts(claim) == [SHOWN, SHOWN, NOT_TESTABLE] and claim.verdict == SHOWN
    assert "controls with the same λ" in claim.parts[2].missing


def test_suppression_that_suppresses_nothing_tests_nothing():
    weak = {**EFFECTS, "minus": {"loss": 1.0, "blimp": -0.3}}
    claim = answer(simulate(np.random.default_rng(3), weak, seeds=range(5)))[2]
    assert verdicts(claim)[0] == NOT_TESTABLE and "a λ that lowers UAS" in claim.missing


def test_distant_loss_drop_is_opposite_and_gradual_rise_is_not_abrupt():
    runs = simulate(np.random.default_rng(4), {"base": {}}, seeds=range(4))
    for run in runs:
        for record in run.evaluations:
            record["validation_mlm_loss"] = 6 - 2 * np.clip((record["step"] - 240) / 100, 0, 1)
    assert verdicts(answer(runs)[0]) == [SHOWN, OPPOSITE]
    for run in runs:
        for record in run.evaluations:
            record["uas"] = 0.2 + 0.3 * np.clip((record["step"] - 400) / 800, 0, 1)
    assert verdicts(answer(runs)[0])[0] == NOT_SHOWN


@pytest.mark.parametrize("base_seeds", [(1, 2, 3), (1, 2, 3, 4)])  # paired, and Welch
@pytest.mark.parametrize("validation", [True, False])
def test_onsets_that_agree_to_the_evaluation_are_tested(base_seeds, validation):
    """No spread is no reason not to test; the grid of evaluations leaves an error of its own."""
    rng = np.random.default_rng(10)
    runs = simulate(rng, {"base": {}}, seeds=base_seeds) + simulate(rng, {"minus": {}})
    for run in runs:
        for record in run.evaluations:
            start = 700 if run.label == "base" else 300
            loss = 6 - 2 * np.clip((record["step"] - start) / 100, 0, 1)
            if validation:
                record["validation_mlm_loss"] = loss
            else:  # the training loss averaged between evaluations
                del record["validation_mlm_loss"]
                run.train.append({"kind": "train", "step": record["step"], "mlm_loss": loss})
    runs = [replace(run, training_loss=not validation) for run in runs]
    part = answer(runs)[3].parts[2]
    error = 100 / np.sqrt(18) if len(base_seeds) == 3 else 100 * np.sqrt((1 / 3 + 1 / 4) / 12)
    assert part.verdict == SHOWN
    assert f"breaks 400 ± {error:.0f} steps earlier than in base" in part.evidence[0]
    plus = simulate(rng, {"plus": {}}, seeds=(1,))
    for record in plus[0].evaluations:
        record["validation_mlm_loss"] = 6 - 2 * np.clip((record["step"] - 400) / 100, 0, 1)
    del plus[0].evaluations[5]  # evaluations of another condition that are farther apart change nothing here
    assert answer(runs + plus)[3].parts[2] == part


def test_simultaneous_onsets_have_no_order():
    claim = answer(simulate(np.random.default_rng(5), {"base": {}}, seeds=range(5), lag=0))[1]
    assert verdicts(claim) == [SHOWN, NOT_SHOWN, NOT_SHOWN]


@pytest.mark.parametrize("seeds", [(1,), ()])
def test_too_few_runs_test_nothing(seeds):
    runs = simulate(np.random.default_rng(6), EFFECTS, seeds=(1,)) + simulate(
        np.random.default_rng(7), {"minus": {}, "plus": {}}, seeds=[9 for _ in seeds]
    )
    claims = answer(runs)
    assert [claim.verdict for claim in claims] == [NOT_TESTABLE] * 5
    assert all(claim.missing for claim in claims)


def test_null_sweeps_claim_nothing():
    """Where all conditions are alike, at most about 5 % of sweeps show an effect (claims 3 and 4, each part).

    Where curves are flat noise, hardly any shows an onset (claims 1, 2 and 5).
    """
    rng = np.random.default_rng(8)
    shown = {"alike": np.zeros(5), "flat": np.zeros(5)}
    parts = np.zeros(6)
    count = 60
    for _ in range(count):
        alike = answer(simulate(rng))
        flat = answer(simulate(rng, {"base": {}}, rise=False, twonn=1e-9))
        shown["alike"] += [claim.verdict in (SHOWN, OPPOSITE) for claim in alike]
        shown["flat"] += [claim.verdict in (SHOWN, OPPOSITE) for claim in flat]
        parts += [part.verdict in (SHOWN, OPPOSITE) for claim in alike[2:4] for part in claim.parts]
    assert shown["alike"][0] > 0.9 * count  # there is an onset in these runs, and it is found
    assert shown["alike"][2] + shown["alike"][3] <= 0.08 * count
    assert (parts <= 0.12 * count).all()  # 5 % expected: 12 % of 60 are exceeded in 1 of 100 cases
    assert shown["flat"].sum() == 0


@pytest.mark.full
def test_null_sweeps_claim_nothing_many_times():
    """The error rate of every part, over 1000 sweeps."""
    rng = np.random.default_rng(9)
    parts, sweeps = np.zeros(6), 1000
    for _ in range(sweeps):
        claims = answer(simulate(rng))
        parts += [part.verdict in (SHOWN, OPPOSITE) for claim in claims[2:4] for part in claim.parts]
    assert (parts / sweeps <= 0.065).all()


def test_differences_of_null_sweeps_keep_their_error_rate():
    """Of the whole table of differences to base, some corrected p < 0.05 in at most about 5 % of null sweeps."""
    rng = np.random.default_rng(10)
    false = 0
    for _ in range(100):
        found = summarize(simulate(rng))
        false += any(c.sign_shown() for condition in found for c in condition.difference.values())
    assert false <= 11


def test_order_counts_runs():
    runs = simulate(np.random.default_rng(11), {"base": {}}, seeds=range(4), lag=300)
    order = order_of(runs, find_onsets(runs, DELTA))
    assert (order.first, order.last, order.num_runs) == (4, 0, 4) and order.sign_p == pytest.approx(2 / 16)
    assert order.established and 200 < order.lag.mean < 400 and order.items is None
    assert order_of(runs[:1], find_onsets(runs[:1], DELTA)).established is False


def test_agreeing_seeds_are_not_surer_than_evaluations_allow():
    assert mean_distance([100.0, 100.0, 100.0], 100).error == pytest.approx(100 / 18**0.5)
    assert mean_distance([0.0, 300.0], 100).error == pytest.approx(150) and mean_distance([5.0], 100).error is None
    runs = simulate(np.random.default_rng(5), {"base": {}}, seeds=(1, 2), lag=100)
    for run in runs:
        run.evaluations[:] = [{**record} for record in runs[0].evaluations]
    order = order_of(runs, find_onsets(runs, DELTA))
    assert order.lag.mean == 100 and not order.established


def test_unfinished_runs_are_left_out_of_differences():
    runs = simulate(np.random.default_rng(12), EFFECTS)
    (minus,) = (c for c in summarize(runs) if c.label == "minus")
    assert minus.difference["loss"].value.paired
    del runs[3].evaluations[-4:]
    (cut,) = (c for c in summarize(runs) if c.label == "minus")
    value = cut.difference["loss"].value
    assert (value.counts, value.paired) == ((2, 3), False)
    assert cut.final["loss"].mean == pytest.approx(np.mean([run.final(METRICS[0]) for run in runs[4:6]]))
    del runs[4].evaluations[-4:], runs[5].evaluations[-4:]
    (cut,) = (c for c in summarize(runs) if c.label == "minus")
    assert cut.final["loss"].count == 3 and cut.difference == {}  # shown, but compared with nothing


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([(SHOWN, True), (SHOWN, True)], SHOWN),
        ([(SHOWN, True), (NOT_SHOWN, False)], NOT_SHOWN),
        ([(SHOWN, True), (NOT_TESTABLE, False)], SHOWN),
        ([(SHOWN, True), (NOT_TESTABLE, True)], NOT_TESTABLE),
        ([(OPPOSITE, True), (NOT_TESTABLE, True)], OPPOSITE),
        ([(NOT_SHOWN, True), (SHOWN, False)], NOT_SHOWN),
        ([(SHOWN, True), (OPPOSITE, False)], NOT_SHOWN),
    ],
)
def test_verdict_of_a_claim(parts, expected):
    assert Claim(1, "", "", [Part("", "", verdict, core=core) for verdict, core in parts]).verdict == expected


def test_roles_follow_from_the_configuration():
    runs = simulate(np.random.default_rng(13), seeds=(1,))
    roles = ["base", "suppress", "promote", "release", "release", "control", "control"]
    assert [run.role for run in runs] == roles and [run.label for run in runs] == list(CONDITIONS)
    assert [run.release_step for run in runs[3:5]] == [200, 800]
    assert [run.constant_weight for run in runs] == [0, 0.02, -0.02, None, None, 0.02, 0.02]
