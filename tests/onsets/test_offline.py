"""Onsets: the exact maximum against a fine grid, synthetic curves with known breaks, noise without any."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruptures.costs import CostLinear

from megatron_sas.onsets.offline import CHI2_95, break_point, change_point


def plateau_and_rise(steps, onset, *, width=120, rise=0.3, start=0.08, after=0.03):
    """Flat, a steep rise at `onset` over `width` steps, then slow growth: the shape of UAS over training."""
    late = np.clip((steps - onset - width) / 300, 0, 1)
    return start + rise * np.clip((steps - onset) / width, 0, 1) + after * late


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(-20, 20)), min_size=3, max_size=15, unique_by=lambda p: p[0]),
    st.integers(1, 30),
    st.sampled_from([1, -1]),
)
def test_equals_a_search_over_a_fine_grid(points, delta, sign):
    points.sort()
    steps, values = np.array(points, float).T
    got = break_point(steps, values, delta, sign)
    grid = np.arange(steps[0] + delta, steps[-1] - delta + 1e-9, 0.25)  # integers, so every knot lies on the grid
    if not len(grid):
        assert got.step is None and "less than two windows" in got.reason
        return

    def f(t):
        return sign * np.interp(t, steps, values)

    objective = (f(grid + delta) - f(grid)) - (f(grid) - f(grid - delta))
    if objective.max() <= 1e-6:
        assert got.step is None and "never bends" in got.reason
    else:
        assert got.strength == pytest.approx(objective.max())
        assert got.step == grid[np.flatnonzero(objective > objective.max() - 1e-6)[0]]


@pytest.mark.parametrize("delta", [50, 100, 200])
def test_a_kink_is_found_exactly(delta):
    steps = np.arange(0, 1001, 25)
    values = np.maximum(0, steps - 400) / 1000
    onset = break_point(steps, values, delta)
    assert (onset.step, onset.strength) == (400, pytest.approx(delta / 1000))
    assert onset.detected and onset.noise == pytest.approx(0, abs=1e-12)
    mirrored = break_point(steps, -values, delta, sign=-1)
    assert (mirrored.step, mirrored.strength) == (onset.step, onset.strength)


def test_dense_early_evaluations_do_not_move_the_break():
    """A curve that is linear between evaluations gives one answer however often it is sampled."""
    coarse = np.arange(0, 1001, 50)
    dense = np.unique(np.concatenate([np.arange(0, 300, 7), coarse]))
    values = plateau_and_rise(coarse, 450)
    got = break_point(dense, np.interp(dense, coarse, values), 80)
    expected = break_point(coarse, values, 80)
    assert (got.step, got.strength) == (expected.step, pytest.approx(expected.strength))


def test_a_loss_breaks_after_its_first_fall():
    """The steep fall of the first steps bends upward, so the downward break is the end of the plateau."""
    steps = np.arange(0, 1001, 25)
    loss = 4.6 + 4 * np.exp(-steps / 40) - 1.3 * np.clip((steps - 500) / 150, 0, 1)
    onset = break_point(steps, loss, 100, sign=-1)
    assert onset.step == 500 and onset.detected
    found = change_point(steps, loss, sign=-1)
    assert found.low <= 500 <= found.high


@pytest.mark.parametrize("seed", range(5))
def test_noisy_onsets_are_found(seed):
    rng = np.random.default_rng(seed)
    steps = np.linspace(0, 800, 33)
    truth = rng.uniform(250, 450)
    values = plateau_and_rise(steps, truth) + rng.normal(0, 0.01, len(steps))
    onset = break_point(steps, values, 100)
    assert onset.detected
    assert abs(onset.step - truth) < 40
    assert 0.003 < onset.noise < 0.03
    found = change_point(steps, values)
    assert abs(found.step - truth) < 60
    assert found.low <= found.step < found.high


def test_a_drift_on_few_items_is_no_onset():
    """The same pairs at every step: little scatter between neighbours, but a wide wandering."""
    steps = np.arange(0, 1001, 50)
    chance = np.interp(steps, [0, 500, 1000], [0.558, 0.448, 0.5])
    assert break_point(steps, chance, 100).detected
    few = break_point(steps, chance, 100, item_error=np.sqrt(0.25 / 165))
    assert not few.detected and few.step == 500 and few.noise == pytest.approx(0.0389, abs=1e-4)
    rise = plateau_and_rise(steps, 500, start=0.5)
    assert break_point(steps, rise, 100, item_error=np.sqrt(0.25 / 67_000)).detected
    noisy = rise + np.random.default_rng(0).normal(0, 0.01, len(steps))
    assert break_point(steps, noisy, 100, item_error=1e-9) == break_point(steps, noisy, 100)


def test_the_interval_covers_and_noise_is_not_an_onset():
    rng = np.random.default_rng(0)
    steps = np.linspace(0, 800, 24)
    repetitions, covered, detected_in_noise, found_in_noise = 40, 0, 0, 0
    for _ in range(repetitions):
        truth = rng.uniform(300, 450)
        found = change_point(steps, plateau_and_rise(steps, truth) + rng.normal(0, 0.01, len(steps)))
        covered += found.low <= truth <= found.high
        found_in_noise += change_point(steps, rng.normal(0, 0.01, len(steps))).step is not None
    for _ in range(10 * repetitions):
        detected_in_noise += break_point(steps, rng.normal(0, 0.01, len(steps)), 100).detected
    assert covered >= 0.85 * repetitions
    assert found_in_noise <= 0.1 * repetitions
    assert detected_in_noise <= 0.06 * 10 * repetitions


def test_one_break_equals_exhaustive_least_squares():
    """Estimate and interval against a plain loop over all positions, on a curve with exactly one break."""
    rng = np.random.default_rng(3)
    n = 20
    steps = np.arange(n) * 10.0
    values = np.where(np.arange(n) < 12, 0.1, 0.5) + rng.normal(0, 0.05, n)

    def rss(part):
        line = np.polyfit(steps[part], values[part], 1)
        return ((np.polyval(line, steps[part]) - values[part]) ** 2).sum()

    total = {b: rss(slice(0, b)) + rss(slice(b, n)) for b in range(2, n - 1)}
    best = min(total, key=total.get)
    accepted = [b for b in total if (n - 5) * np.log(total[b] / total[best]) <= CHI2_95]
    found = change_point(steps, values)
    assert (found.step, found.low, found.high) == (
        steps[best - 1],
        steps[min(accepted) - 1],
        steps[max(accepted)],
    )


def test_two_breaks_equal_exhaustive_least_squares():
    rng = np.random.default_rng(5)
    steps = np.linspace(0, 800, 30)
    values = plateau_and_rise(steps, 400, width=200, after=0) + rng.normal(0, 0.01, 30)
    cost = CostLinear().fit(np.column_stack([values, np.ones(30), steps / 800]))
    pairs = [(a, b) for a, b in itertools.combinations(range(2, 29), 2) if b - a >= 2]
    first, _ = min(pairs, key=lambda p: cost.error(0, p[0]) + cost.error(p[0], p[1]) + cost.error(p[1], 30))
    assert change_point(steps, values).step == steps[first - 1]


def test_a_jump_between_two_evaluations():
    steps = np.arange(0, 1000, 25)
    values = np.where(steps < 600, 0.1, 0.4)
    found = change_point(steps, values)
    assert (found.step, found.low, found.high) == (575, 575, 600)


def test_many_points_are_thinned():
    steps = np.arange(3000)
    values = plateau_and_rise(steps, 1500, width=500, after=0) + np.random.default_rng(0).normal(0, 0.02, 3000)
    found = change_point(steps, values)
    assert found.low <= 1500 <= found.high
    assert found.high - found.low < 300


def test_order_duplicates_and_missing_values_do_not_matter():
    steps = np.arange(0, 1000, 25.0)
    values = plateau_and_rise(steps, 400)
    messy_steps = np.concatenate([[400, 425], steps, [510]])[::-1]
    messy_values = np.concatenate([values[16:18], values, [np.nan]])[::-1]
    assert break_point(messy_steps, messy_values, 100) == break_point(steps, values, 100)
    assert change_point(messy_steps, messy_values) == change_point(steps, values)
    with_none = [None if index == 3 else float(value) for index, value in enumerate(values)]
    assert break_point(steps, with_none, 100).step == break_point(steps, values, 100).step


@pytest.mark.parametrize(
    "values, reason",
    [
        ([], "only 0"),
        ([1, 2], "only 2"),
        ([np.nan] * 20, "only 0"),
        ([0.3] * 20, "never bends upward"),
        (list(range(20)), "never bends upward"),
        ([-(i**2) for i in range(20)], "never bends upward"),
        ([0, 1, 5], "less than two windows"),
    ],
)
def test_no_break_has_a_reason(values, reason):
    onset = break_point(range(0, 10 * len(values), 10), values, 30)
    assert (onset.step, onset.strength, onset.detected) == (None, None, False)
    assert reason in onset.reason


@pytest.mark.parametrize(
    "values, sign, reason",
    [
        ([1, 2, 3], 1, "only 3"),
        ([0.3] * 20, 1, "constant"),
        (list(range(20)), 1, "one straight line"),
        ([0] * 10 + [1] * 10, -1, "never turns downward"),
    ],
)
def test_no_change_point_has_a_reason(values, sign, reason):
    found = change_point(range(len(values)), values, sign)
    assert (found.step, found.low, found.high) == (None, None, None)
    assert reason in found.reason


def test_wrong_arguments():
    with pytest.raises(ValueError, match="delta"):
        break_point([1, 2, 3], [1, 2, 3], 0)
    with pytest.raises(ValueError, match="sign"):
        break_point([1, 2, 3], [1, 2, 3], 1, sign=2)
    with pytest.raises(ValueError, match="one length"):
        change_point([1, 2], [1])


def test_the_distance_of_evaluations_is_that_around_the_onset():
    """As in the paper's schedule: dense at first, then ten times coarser, where the onset lies."""
    steps = np.concatenate([np.arange(0, 10_000, 500), np.arange(10_000, 100_001, 5_000)])
    onset = break_point(steps, np.clip((steps - 22_000) / 5_000, 0, 1), 10_000)
    assert onset.detected and onset.spacing == 5_000
    early = break_point(steps, np.clip((steps - 4_000) / 1_000, 0, 1), 2_000)
    assert early.detected and early.spacing == 500


@pytest.mark.parametrize(("start", "side"), [(50, "before"), (950, "after")])
def test_a_bend_where_the_search_ends_is_not_clear(start, side):
    """A rise that has begun at the second evaluation, or one that has only begun: the break may lie beyond."""
    steps = np.arange(0, 1001, 50)
    onset = break_point(steps, np.clip((steps - start) / 200, 0, 1), 100)
    assert onset.at_edge and not onset.detected and side in onset.reason
    assert onset.step == (100 if side == "before" else 900)
    inside = break_point(steps, np.clip((steps - 400) / 200, 0, 1), 100)
    assert inside.detected and not inside.at_edge and inside.reason == ""
