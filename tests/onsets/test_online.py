"""The online detector: what it takes for an onset and what not, and real curves.

`toy_curves.npz` holds two runs of an earlier toy language, seed 1: λ = 0 for 900 updates, evaluated every 10 on 100
sentences, and λ = 0.02 for 1,200 updates, evaluated every 50 on 150 sentences.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_sas.onsets.online import MIN_BLOCKS, OnsetDetector

STEPS = np.arange(0, 3001, 10)
CURVES = np.load(Path(__file__).parent / "toy_curves.npz")


def first(steps, values, delta=120, sign=1, start=0):
    """The step and detection of the first onset, or None."""
    detector = OnsetDetector(delta, sign, start)
    for step, value in zip(steps, values, strict=True):
        if found := detector.add(int(step), float(value)):
            return int(step), found
    return None


def wander(rng, correlation):
    """A stationary random curve whose neighbours are correlated."""
    values = rng.normal(0, 1, len(STEPS))
    for i in range(1, len(STEPS)):
        values[i] = correlation * values[i - 1] + values[i] * np.sqrt(1 - correlation**2)
    return values


@pytest.mark.parametrize(("correlation", "allowed"), [(0.0, 0.03), (0.8, 0.1), (0.95, 0.1)])
def test_noise_is_rarely_an_onset(correlation, allowed):
    """Runs of 25 windows; a UAS that wanders for several evaluations at a time is the hard case."""
    rng = np.random.default_rng(1)
    alarms = np.mean([first(STEPS, wander(rng, correlation)) is not None for _ in range(100)])
    assert alarms <= allowed


SMOOTH = {
    "line": lambda t: 2 * t,
    "square": lambda t: t**2,
    "power law": lambda t: -((t + 0.05) ** -0.5),
    "saturation": lambda t: 1 - np.exp(-5 * t),
    "slow sigmoid": lambda t: 1 / (1 + np.exp(-(t - 0.5) / 0.08)),  # 10 to 90 % in 9 windows: the border
    "constant": lambda t: 0 * t,
    "dip": lambda t: -np.exp(-(((t - 0.5) / 0.02) ** 2)),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_curves_are_no_onsets(name):
    """Without noise, where any curvature is significant, and with noise of 1 % of their range."""
    rng = np.random.default_rng(2)
    curve = SMOOTH[name](STEPS / 3000)
    assert first(STEPS, curve) is None
    alarms = np.mean([first(STEPS, curve + rng.normal(0, 0.01, len(STEPS))) is not None for _ in range(40)])
    assert alarms <= (0.25 if name == "slow sigmoid" else 0.05)


@pytest.mark.parametrize("width", [1, 60, 150])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_jump_is_found_while_it_happens(width, sign):
    """Steep over up to a window and a quarter, 15 times the noise: seen within 1½ windows of its beginning."""
    rng = np.random.default_rng(3)
    for _ in range(20):
        onset = rng.integers(700, 2500)
        curve = sign * 0.3 * np.clip((STEPS - onset) / width, 0, 1) + rng.normal(0, 0.02, len(STEPS))
        step, found = first(STEPS, curve, sign=sign)
        assert onset <= step <= onset + 180
        assert found.strength > found.threshold


def test_it_does_not_look_ahead_and_can_be_resumed():
    """The answer after any point is the same whatever follows, and for a detector that was fed the past anew."""
    rng = np.random.default_rng(4)
    curve = 0.3 * np.clip((STEPS - 1505) / 100, 0, 1) + rng.normal(0, 0.01, len(STEPS))
    step, found = first(STEPS, curve)
    known = int(np.searchsorted(STEPS, step)) + 1
    assert first(STEPS[:known], curve[:known]) == (step, found)
    assert first(STEPS[: known - 1], curve[: known - 1]) is None
    other = np.append(curve[:known], rng.normal(0, 9, len(STEPS) - known))
    assert first(STEPS, other) == (step, found)


def test_missing_values_and_uneven_evaluations():
    curve = 0.3 * np.clip((STEPS - 1505) / 100, 0, 1) + np.random.default_rng(5).normal(0, 0.01, len(STEPS))
    broken = curve.copy()
    broken[::7] = np.nan
    uneven = np.random.default_rng(6).random(len(STEPS)) < 0.5
    for steps, values in ((STEPS, broken), (STEPS[uneven], curve[uneven]), (STEPS[::5], curve[::5])):
        step, _ = first(steps, values)
        assert 1505 <= step <= 1505 + 300
    assert OnsetDetector(120).add(1, None) is None


def test_nothing_is_decided_without_a_past():
    curve = np.where(np.arange(0, 300) < 150, 0.0, 1.0)
    assert first(np.arange(300), curve) is None  # ten blocks of 30 steps
    assert MIN_BLOCKS > 10


def test_the_loss_of_a_real_run_falls_where_uas_rises():
    """The steepest 100 steps of UAS come after the detection, within the 400 steps that are saved then."""
    steps, uas, loss = CURVES["base_steps"], CURVES["base_uas"], CURVES["base_loss"]
    step, found = first(np.arange(1, len(loss) + 1), loss, delta=100, sign=-1, start=100)
    assert step == 500
    assert found.strength == pytest.approx(0.183, abs=0.002)
    rise = [np.interp(s + 100, steps, uas) - np.interp(s, steps, uas) for s in steps[steps <= 800]]
    steepest = steps[int(np.argmax(rise))]
    assert step - 300 <= steepest - 100 and steepest + 100 <= step + 400
    untouched = np.interp(step, steps, uas) - uas[steps < 300].max()
    assert untouched < 0.25 * (uas[-1] - uas[steps < 300].max())  # most of the rise is still to come


def test_a_suppressed_real_run_has_no_onset():
    for delta in (80, 100, 160, 200):
        loss = CURVES["minus_loss"]
        assert first(np.arange(1, len(loss) + 1), loss, delta=delta, sign=-1, start=100) is None
        assert first(CURVES["minus_steps"], CURVES["minus_uas"], delta=delta, start=100) is None
