"""Onsets of runs: what the number of evaluation items says about the noise of a curve."""

from pathlib import Path

import numpy as np
import pytest

from megatron_sas.evaluation.minimal_pairs import BLIMP
from megatron_sas.evaluation.uas import UAS
from megatron_sas.evaluation.validation import LOSS
from megatron_sas.report.run_onsets import find_onsets, item_error, order_of
from megatron_sas.report.trajectories import Run

STEPS = np.arange(0, 1001, 50)


def run_with(blimp, *, sets=33, pairs_per_set=None, counts=None):
    """A run with a BLiMP curve over `STEPS`; `counts` are pairs of each set, `pairs_per_set` those of all."""
    if pairs_per_set is not None:
        counts = [pairs_per_set] * sets
    rows = {f"set_{n}": 0.5 if counts is None else {"accuracy": 0.5, "num_pairs": counts[n]} for n in range(sets)}
    evaluations = [
        {
            "kind": "evaluation",
            "step": int(step),
            "validation_mlm_loss": 5.0,
            "uas": 0.2,
            "uas_relations": {"det": {"count": 300, "accuracy": 0.2}, "obj": {"count": 100, "accuracy": 0.2}},
            "blimp": float(value),
            "blimp_sets": rows,
        }
        for step, value in zip(STEPS, blimp, strict=True)
    ]
    return Run(Path("/run"), "base", {}, [], evaluations, [])


def detected(run):
    return find_onsets([run], 100)[run.path]["blimp"].strongest.detected


def test_blimp_at_chance_on_few_pairs_does_not_break_and_a_rise_on_many_does():
    chance = np.interp(STEPS, [0, 500, 1000], [0.558, 0.448, 0.5])
    assert detected(run_with(chance))  # nothing is known of the pairs
    assert not detected(run_with(chance, pairs_per_set=5))
    rise = 0.5 + 0.3 * np.clip((STEPS - 500) / 150, 0, 1)
    assert detected(run_with(rise, sets=67, pairs_per_set=100))


def test_the_standard_error_of_a_value():
    half = np.full(len(STEPS), 0.5)
    assert item_error(run_with(half, pairs_per_set=5), BLIMP) == pytest.approx(np.sqrt(0.25 / 165))
    assert item_error(run_with(half), BLIMP) is None
    unequal = run_with(half, sets=2, counts=[10, 30])  # a mean over two sets, each with an error of its own
    assert item_error(unequal, BLIMP) == pytest.approx(np.sqrt(0.25 / 10 + 0.25 / 30) / 2)
    assert item_error(unequal, UAS) == pytest.approx(np.sqrt(0.2 * 0.8 / 400))
    assert item_error(unequal, LOSS) is None


def test_no_order_finer_than_the_evaluations_around_it():
    """UAS and BLiMP break one coarse interval apart, at evaluations that are dense elsewhere."""
    steps = np.concatenate([np.arange(0, 10_000, 500), np.arange(10_000, 60_001, 5_000)])
    uas, blimp = (
        np.interp(steps, [0, start, start + 10_000, 60_000], [0.2, 0.2, 0.8, 0.8]) for start in (20_000, 21_000)
    )
    rows = [
        {"kind": "evaluation", "step": int(step), "uas": u, "blimp": b}
        for step, u, b in zip(steps, uas, blimp, strict=True)
    ]
    runs = [Run(Path(f"/run-{seed}"), "base", {}, [], rows, []) for seed in range(3)]
    order = order_of(runs, find_onsets(runs, 10_000))
    assert order.spacing == 5_000 and not order.established
