"""Claims about when things happen, from the base runs: 1 (structure), 2 (capabilities), 5 (complexity)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_sas.evaluation.base import Metric
from megatron_sas.evaluation.complexity import TWONN
from megatron_sas.evaluation.minimal_pairs import BLIMP
from megatron_sas.evaluation.uas import UAS
from megatron_sas.evaluation.validation import LOSS
from megatron_sas.onsets.offline import Onset, break_point
from megatron_sas.report.claims import (
    MIN_RUNS,
    NOT_SHOWN,
    NOT_TESTABLE,
    OPPOSITE,
    SHOWN,
    Claim,
    Part,
    enough,
)
from megatron_sas.report.run_onsets import Onsets, detected_onset, mean_distance, order_of, widest
from megatron_sas.report.trajectories import Curve, Run

SHORT_WINDOW = 0.2  # of a curve's length
ABRUPT_SHARE = 0.5  # of its whole rise, within such a window
MOST = f"two thirds of the base runs (at least {MIN_RUNS})"


def structure_onset(base: Sequence[Run], onsets: Onsets, delta: float) -> Claim:
    """Claim 1: UAS rises abruptly, together with a drop of the loss."""
    rule = (
        f"in {MOST}, UAS has a clear upward break, and at least {ABRUPT_SHARE:.0%} of its rise (maximum − minimum) "
        f"falls into one window of {SHORT_WINDOW:.0%} of the run"
    )
    usable = [run for run in base if _can_break(run, UAS, delta)]
    if len(usable) < MIN_RUNS:
        abrupt = Part("UAS rises abruptly.", rule, NOT_TESTABLE, missing=_missing(UAS.title))
    else:
        shares = [steepest_share(run.metric(UAS)) for run in usable]
        detected = [detected_onset(onsets, run, UAS) is not None for run in usable]
        count = sum(c and share >= ABRUPT_SHARE for c, share in zip(detected, shares, strict=True))
        evidence = [
            f"UAS breaks clearly in {sum(detected)} of {len(usable)} runs.",
            f"The steepest {SHORT_WINDOW:.0%} of training holds {_range(shares, percent=True)} of its rise.",
        ]
        abrupt = Part("UAS rises abruptly.", rule, SHOWN if enough(count, len(usable)) else NOT_SHOWN, evidence)
    statement = "SAS appears abruptly in a short window, at the same time as a steep drop of the loss."
    return Claim(1, "Structure onset", statement, [abrupt, _loss_drop(base, onsets, delta)])


def capabilities_onset(base: Sequence[Run], onsets: Onsets, delta: float) -> Claim:
    """Claim 2: BLiMP breaks upward right after UAS."""
    names = ("BLiMP breaks upward.", "Structure comes first.", "Capabilities follow soon.")
    rules = (
        f"in {MOST}, BLiMP has a clear upward break",
        "over the base runs in which both break clearly, the 95 % t-interval of the mean lag (BLiMP's onset − UAS's) "
        "lies above 0, so does its bootstrap interval over items if there is one, and the mean is one evaluation "
        "interval or more; below 0 in the same way: opposite",
        "structure comes first, and the upper end of the 90 % t-interval of the mean lag is at most "
        f"2Δ = {2 * delta:g} steps",
    )
    usable = [run for run in base if _can_break(run, BLIMP, delta) and _can_break(run, UAS, delta)]
    if len(usable) < MIN_RUNS:
        missing = _missing("UAS and BLiMP")
        parts = [Part(name, rule, NOT_TESTABLE, missing=missing) for name, rule in zip(names, rules, strict=True)]
    else:
        detected = sum(detected_onset(onsets, run, BLIMP) is not None for run in usable)
        evidence = [f"BLiMP breaks clearly in {detected} of {len(usable)} runs."]
        upward = Part(names[0], rules[0], SHOWN if enough(detected, len(usable)) else NOT_SHOWN, evidence)
        parts = [upward, *_order_parts(usable, onsets, delta, names[1:], rules[1:])]
    statement = "Grammatical ability (BLiMP) breaks upward right after structure onset."
    return Claim(2, "Capabilities onset", statement, parts)


def _order_parts(
    usable: Sequence[Run], onsets: Onsets, delta: float, names: Sequence[str], rules: Sequence[str]
) -> list[Part]:
    """Whether structure comes first, and whether capabilities follow soon."""
    order = order_of(usable, onsets)
    if order is None or not enough(len(order.runs), len(usable)):
        evidence = [f"Both break clearly in {0 if order is None else len(order.runs)} of {len(usable)} runs."]
        return [Part(name, rule, NOT_SHOWN, evidence) for name, rule in zip(names, rules, strict=True)]
    low, high = order.lag.interval(0.95)
    evidence = [
        f"BLiMP's onset minus UAS's is {order.lag.mean:.0f} steps on average (95 % interval over {len(order.runs)} "
        f"seeds {low:.0f} to {high:.0f}); UAS is first in {order.first}, last in {order.last} runs.".replace("-", "−")
    ]
    if order.items:
        items = f"{order.items[0]:.0f} to {order.items[1]:.0f}".replace("-", "−")
        evidence.append(f"Over resampled items the mean lag is {items} steps (95 %).")
    if abs(order.lag.mean) < order.spacing:
        evidence.append(f"This is less than one evaluation interval ({order.spacing:g} steps).")
    verdict = (SHOWN if order.lag.mean > 0 else OPPOSITE) if order.established else NOT_SHOWN
    upper = order.lag.interval(0.9)[1]
    soon = SHOWN if verdict == SHOWN and upper <= 2 * delta else NOT_SHOWN
    limit = f"Upper end of the mean lag: {upper:.0f} steps; 2Δ = {2 * delta:g}.".replace("-", "−")
    return [Part(names[0], rules[0], verdict, evidence), Part(names[1], rules[1], soon, [limit])]


def complexity_phases(base: Sequence[Run], onsets: Onsets, delta: float) -> Claim:
    """Claim 5: the intrinsic dimension breaks where structure or capabilities do."""
    rule = (
        f"in {MOST}, the intrinsic dimension (TwoNN) breaks clearly, up or down, and the 95 % t-interval of the mean "
        f"distance of its first break to structure onset, or to capabilities onset, lies within ±Δ = {delta:g} steps; "
        "both intervals wholly outside: opposite"
    )
    name = "The intrinsic dimension breaks where structure or capabilities do."
    statement = "Model complexity (intrinsic dimension by TwoNN) moves through the same phases."
    usable = [run for run in base if _spans(run.curve(TWONN.key), delta) and _can_break(run, UAS, delta)]
    if len(usable) < MIN_RUNS:
        missing = _missing("UAS and the intrinsic dimension") + " (tools/eval_trajectory.py with --text)"
        return Claim(5, "Complexity", statement, [Part(name, rule, NOT_TESTABLE, missing=missing)])
    firsts = {str(run.path): first_break(run.curve(TWONN.key), delta) for run in usable}
    detected = [run for run in usable if firsts[str(run.path)][0].detected]
    upward = sum(firsts[str(run.path)][1] > 0 for run in detected)
    evidence = [
        f"TwoNN breaks clearly in {len(detected)} of {len(usable)} runs ({upward} upward, {len(detected) - upward} "
        "downward)."
    ]
    verdicts = []
    for metric, title in ((UAS, "structure"), (BLIMP, "capabilities")):
        pairs = [(firsts[str(r.path)][0], detected_onset(onsets, r, metric)) for r in detected]
        pairs = [(found, onset) for found, onset in pairs if onset is not None]
        if not enough(len(pairs), len(usable)):
            evidence.append(f"Both it and {title} break clearly in {len(pairs)} of {len(usable)} runs.")
            verdicts.append(NOT_SHOWN)
            continue
        verdict, text = _coincide(pairs, delta, 0.95)
        verdicts.append(verdict)
        evidence.append(f"Distance to {title} onset: {text}.")
    verdict = SHOWN if SHOWN in verdicts else OPPOSITE if set(verdicts) == {OPPOSITE} else NOT_SHOWN
    return Claim(5, "Complexity", statement, [Part(name, rule, verdict, evidence)])


def steepest_share(curve: Curve, window: float = SHORT_WINDOW) -> float:
    """The largest rise within a window of this share of the curve's length, as a share of maximum − minimum."""
    width = window * (curve.steps[-1] - curve.steps[0])
    starts = np.concatenate([curve.steps, curve.steps - width])
    starts = starts[(starts >= curve.steps[0]) & (starts <= curve.steps[-1] - width)]
    if not len(starts) or np.ptp(curve.values) == 0:
        return 0.0
    rises = np.interp(starts + width, curve.steps, curve.values) - np.interp(starts, curve.steps, curve.values)
    return float(rises.max() / np.ptp(curve.values))


def first_break(curve: Curve, delta: float) -> tuple[Onset, int]:
    """Of a curve's strongest upward and downward bends the earlier clear one, and its direction; else the stronger.

    A curve that moves from one level to another bends twice, as strongly: the first bend is where its phase begins.
    """
    both = [(break_point(curve.steps, curve.values, delta, sign), sign) for sign in (1, -1)]
    detected = [found for found in both if found[0].detected]
    if detected:
        return min(detected, key=lambda found: found[0].step)
    return max(both, key=lambda found: found[0].strength or 0)


def _loss_drop(base: Sequence[Run], onsets: Onsets, delta: float) -> Part:
    statement = "The loss drops steeply at the same time."
    rule = (
        f"in {MOST}, UAS and the loss both break clearly, and the 90 % t-interval of the mean distance (loss's "
        f"onset − UAS's) lies within ±Δ = {delta:g} steps (two one-sided tests at 5 %); wholly outside (95 %): opposite"
    )
    usable = [run for run in base if _can_break(run, UAS, delta) and _can_break(run, LOSS, delta)]
    if len(usable) < MIN_RUNS:
        return Part(statement, rule, NOT_TESTABLE, missing=_missing("UAS and loss"))
    pairs = [(detected_onset(onsets, run, LOSS), detected_onset(onsets, run, UAS)) for run in usable]
    pairs = [(loss, uas) for loss, uas in pairs if loss is not None and uas is not None]
    evidence = [f"Both break clearly in {len(pairs)} of {len(usable)} runs."]
    if not enough(len(pairs), len(usable)):
        return Part(statement, rule, NOT_SHOWN, evidence)
    verdict, text = _coincide(pairs, delta, 0.9)
    return Part(statement, rule, verdict, [*evidence, f"The loss breaks at UAS's onset {text}."])


def _coincide(pairs: Sequence[tuple[Onset, Onset]], delta: float, confidence: float) -> tuple[str, str]:
    """Whether first - second onset is on average within ±Δ (`confidence`) or outside (95 %): verdict, and in words."""
    found = mean_distance([first.step - second.step for first, second in pairs], widest([b for p in pairs for b in p]))
    low, high = found.interval(confidence)
    wide_low, wide_high = found.interval(0.95)
    verdict = (
        SHOWN if -delta <= low and high <= delta else OPPOSITE if wide_low > delta or wide_high < -delta else NOT_SHOWN
    )
    text = f"{found.mean:+.0f} steps ({confidence:.0%} interval {low:+.0f} to {high:+.0f}, Δ = {delta:g})"
    return verdict, text.replace("-", "−")


def _can_break(run: Run, metric: Metric, delta: float) -> bool:
    return _spans(run.metric(metric), delta)


def _spans(curve: Curve, delta: float) -> bool:
    """Whether a curve is long enough for a break at scale Δ to exist."""
    return len(curve) >= 3 and curve.steps[-1] - curve.steps[0] >= 2 * delta


def _missing(what: str) -> str:
    return f"at least {MIN_RUNS} base runs (seeds) with {what} evaluated at 3 or more steps over 2Δ"


def _range(values: Sequence[float], percent: bool = False) -> str:
    low, high = (f"{v:.0%}" if percent else f"{v:.3g}" for v in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"
