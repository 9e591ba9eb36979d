"""Onsets of runs: the noise of a curve of few items, and resampling of items against the plainest way to do it."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from trajectory_files import Items, write_items

from megatron_sas.core.cli import InputError
from megatron_sas.evaluation.minimal_pairs import BLIMP
from megatron_sas.evaluation.uas import UAS
from megatron_sas.evaluation.validation import LOSS
from megatron_sas.onsets.offline import break_point, onset_steps
from megatron_sas.report.run_onsets import find_onsets, item_error, onset_interval, order_of, resample_curves
from megatron_sas.report.trajectories import Run

SHAPE = (2, 3, 5)
STEPS = np.arange(0, 1001, 50)


def run_with(blimp, *, sets=33, pairs_per_set=None, counts=None, uas=None, baseline=None):
    """A run with a BLiMP curve over `STEPS`; `counts` are pairs of each set, `pairs_per_set` those of all."""
    uas = np.full(len(STEPS), 0.2) if uas is None else uas
    if pairs_per_set is not None:
        counts = [pairs_per_set] * sets
    rows = {f"set_{n}": 0.5 if counts is None else {"accuracy": 0.5, "num_pairs": counts[n]} for n in range(sets)}
    evaluations = [
        {
            "kind": "evaluation",
            "step": int(step),
            "validation_mlm_loss": 5.0,
            "uas": float(accuracy),
            **({} if baseline is None else {"uas_baseline": baseline}),
            "uas_relations": {"det": {"count": 300, "accuracy": 0.2}, "obj": {"count": 100, "accuracy": 0.2}},
            "blimp": float(value),
            "blimp_sets": rows,
        }
        for step, value, accuracy in zip(STEPS, blimp, uas, strict=True)
    ]
    return Run(Path("/run"), "base", {}, [], evaluations, [])


def onset_of(run, name):
    return find_onsets([run], 100)[run.path][name]


def detected(run):
    return onset_of(run, "blimp").strongest.detected


def test_blimp_at_chance_on_few_pairs_does_not_break_and_a_rise_on_many_does():
    chance = np.interp(STEPS, [0, 500, 1000], [0.46, 0.448, 0.558])
    assert detected(run_with(chance))  # nothing is known of the pairs
    assert not detected(run_with(chance, pairs_per_set=5))
    rise = 0.5 + 0.3 * np.clip((STEPS - 500) / 150, 0, 1)
    assert detected(run_with(rise, sets=67, pairs_per_set=100))


def test_noise_of_few_items_names_the_number_that_would_carry_the_bend():
    chance = np.interp(STEPS, [0, 500, 1000], [0.46, 0.448, 0.558])
    strongest = onset_of(run_with(chance, pairs_per_set=5), "blimp").strongest
    assert strongest.reason.startswith("within the noise of 165 items; ")
    enough = int(strongest.reason.split("; ")[1].split()[0])
    assert not detected(run_with(chance, sets=1, counts=[int(enough * 0.98)]))
    assert detected(run_with(chance, sets=1, counts=[int(enough * 1.02)]))


def test_delta_may_be_less_than_an_evaluation_interval():
    rise = np.interp(STEPS, [0, 500, 650, 1000], [0.5, 0.5, 0.9, 0.9])
    onset = find_onsets([run_with(rise)], 10)[Path("/run")]["blimp"].strongest
    assert onset.step == 500 and onset.detected
    dip = np.interp(STEPS, [0, 450, 500, 1000], [0.9, 0.9, 0.1, 0.9])
    assert find_onsets([run_with(dip)], 10)[Path("/run")]["blimp"].strongest.reason.startswith("a recovery")


def test_return_to_the_untrained_level_is_a_recovery():
    """UAS falls from 0.3 to 0.01, stays there, and is back at 0.3 at step 500."""
    uas = np.interp(STEPS, [0, 200, 400, 500, 1000], [0.3, 0.01, 0.01, 0.3, 0.3])
    strongest = onset_of(run_with(np.full(len(STEPS), 0.5), uas=uas), "uas").strongest
    assert strongest.step is not None and not strongest.detected and strongest.reason.startswith("a recovery")
    beyond = np.interp(STEPS, [0, 200, 400, 500, 1000], [0.3, 0.01, 0.01, 0.5, 0.5])
    assert onset_of(run_with(np.full(len(STEPS), 0.5), uas=beyond), "uas").strongest.detected


@pytest.mark.parametrize(("level", "above"), [(0.45, True), (0.40, False)])  # 0.357 + 1.96 * sqrt(0.24 / 400) = 0.405
def test_structure_onset_needs_uas_above_fixed_offsets(level, above):
    uas = np.interp(STEPS, [0, 400, 550, 1000], [0.05, 0.05, level, level])
    onset = onset_of(run_with(np.full(len(STEPS), 0.5), uas=uas, baseline=0.357), "uas")
    difference, (low, high) = onset.above_offsets
    error = np.sqrt(level * (1 - level) / 400)
    assert difference == pytest.approx(level - 0.357) and high - low == pytest.approx(2 * 1.96 * error)
    assert onset.strongest.step is not None and onset.strongest.detected is above
    assert above or onset.strongest.reason == "afterwards it is not above fixed offsets"


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


def items_of(seed, edges=400, sentences=30, relations=6):
    rng = np.random.default_rng(seed)
    places = np.stack([rng.integers(0, sentences, edges) * 3, rng.integers(0, relations, edges)], axis=1)
    return Items(
        edges=places.astype(np.int32),
        correct=rng.random((edges, *SHAPE)) < rng.random((1, *SHAPE)),
        pairs=rng.random(90) < 0.7,
        sets=np.repeat([2, 0, 1], [40, 30, 20]).astype(np.int16),
    )


def run_of_items(tmp_path, items_by_step):
    for step, items in items_by_step.items():
        write_items(Path(tmp_path) / "points" / f"step_{step:08d}", items)
    measured = SimpleNamespace(directory=Path(tmp_path), item_steps=tuple(items_by_step))
    return SimpleNamespace(measured=measured, item_metrics=frozenset({"uas", "blimp"}))


def test_uas_replicates_are_those_of_a_resampled_treebank(tmp_path):
    """Write out each resampled treebank edge by edge and take its best heads anew."""
    items = items_of(0)
    run = run_of_items(tmp_path, {0: items})
    (replicates,) = resample_curves(run, 20, 7)["uas"][1].T
    sentences = np.unique(items.edges[:, 0])
    drawn = np.random.default_rng([7, 0]).integers(0, len(sentences), (20, len(sentences)))
    for value, draw in zip(replicates, drawn, strict=True):
        edges = np.concatenate([np.flatnonzero(items.edges[:, 0] == sentences[s]) for s in draw])
        relations = items.edges[edges, 1]
        hits = sum(items.correct[edges[relations == r]].sum(axis=0).max() for r in np.unique(relations))
        assert value == hits / len(edges)
    assert np.std(replicates) > 0


def test_blimp_replicates_resample_within_sets(tmp_path):
    items = items_of(1)
    (replicates,) = resample_curves(run_of_items(tmp_path, {0: items}), 15, 3)["blimp"][1].T
    expected = []
    for index in (0, 1, 2):
        pairs = items.pairs[items.sets == index]
        drawn = np.random.default_rng([3, 1, index]).integers(0, len(pairs), (15, len(pairs)))
        expected.append([pairs[d].mean() for d in drawn])
    np.testing.assert_allclose(replicates, np.mean(expected, axis=0), rtol=1e-6)


def test_the_same_items_are_drawn_at_every_step(tmp_path):
    items = items_of(2)
    curves = resample_curves(run_of_items(tmp_path, {0: items, 10: items, 20: items}), 30, 0)
    for steps, replicates in curves.values():
        assert steps.tolist() == [0, 10, 20]
        assert (replicates == replicates[:, :1]).all() and np.std(replicates[:, 0]) > 0


def test_onset_of_every_replicate_is_its_break_point():
    rng = np.random.default_rng(0)
    steps = np.sort(rng.choice(1000, 25, replace=False)).astype(float)
    curves = np.clip((steps - 400) / 200, 0, 1) + rng.normal(0, 0.05, (40, 25))
    for sign in (1, -1):
        expected = [break_point(steps, curve, 90, sign).step for curve in sign * curves]
        np.testing.assert_allclose(onset_steps(steps, sign * curves, 90, sign), expected)
    found = onset_interval(steps, curves, 90)
    known = [break_point(steps, curve, 90).step for curve in curves]
    assert found.interval == pytest.approx(tuple(np.quantile(known, [0.025, 0.975])))


def test_curves_without_a_bend_have_no_onset():
    steps = np.arange(10.0)
    assert np.isnan(onset_steps(steps, np.tile(steps, (3, 1)), 2)).all()
    assert np.isnan(onset_steps(steps[:2], np.ones((3, 2)), 2)).all()
    assert np.isnan(onset_steps(steps, np.ones((3, 10)), 6)).all()  # shorter than two windows
    assert onset_interval(steps, np.tile(steps, (3, 1)), 2).interval is None


def test_damaged_items_are_one_line(tmp_path):
    run = run_of_items(tmp_path / "a", {0: items_of(0), 10: items_of(5)})
    with pytest.raises(InputError, match="other items"):
        resample_curves(run, 5, 0)
    (run.measured.directory / "points" / "step_00000010" / "items.npz").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(InputError, match="cannot be read"):
        resample_curves(run, 5, 0)
