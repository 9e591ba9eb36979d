"""What these runs say about the paper's five claims, by rules that do not depend on the data.

The words are in claims.yaml, the reasons in docs/analysis.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
import yaml

from megatron_sas.evaluation.base import Metric
from megatron_sas.evaluation.complexity import TWONN
from megatron_sas.evaluation.minimal_pairs import BLIMP
from megatron_sas.evaluation.uas import UAS
from megatron_sas.evaluation.validation import LOSS
from megatron_sas.onsets.offline import Onset, break_point
from megatron_sas.report.comparisons import Comparison, Condition, compare, control_pairs, correct, runs_of
from megatron_sas.report.run_onsets import (
    Onsets,
    detected_onsets,
    mean_distance,
    onset_difference,
    order_of,
    widest,
)
from megatron_sas.report.statistics import difference, show, show_interval, show_p, true_minus
from megatron_sas.report.trajectories import Curve, Run

SHOWN, NOT_SHOWN, OPPOSITE, NOT_TESTABLE = "shown", "not shown", "opposite", "not testable with these runs"
MIN_RUNS = 2  # seeds of a condition, below which nothing is said about the condition
DETECTED_SHARE = 2 / 3  # of a condition's runs must show a break before it counts as the condition's
SHORT_WINDOW = 0.2  # of a curve's length
ABRUPT_SHARE = 0.5  # of its whole rise, within such a window
LOSS_ONSET = Metric("", title="loss onset", name="loss_onset", direction=-1)


@dataclass(frozen=True)
class Answer:
    """A verdict with its evidence. `missing` says what a test would need; "": as claims.yaml has it."""

    verdict: str
    evidence: Sequence[str] = ()
    missing: str = ""


UNTESTED = Answer(NOT_TESTABLE)


@dataclass(frozen=True)
class Part:
    """One checkable statement of a claim.

    `core` parts must be shown for the claim to be; the others count only where they can be tested. `missing` says what
    would be needed where the verdict is `NOT_TESTABLE`.
    """

    statement: str
    rule: str
    verdict: str
    evidence: Sequence[str] = ()
    missing: str = ""
    core: bool = True


@dataclass(frozen=True)
class Claim:
    """A claim of the paper with its parts."""

    number: int
    name: str
    statement: str
    parts: Sequence[Part]

    @property
    def verdict(self) -> str:
        """Opposite if a core part is; else not testable if a core part is; else shown if all that is testable is."""
        core = [part.verdict for part in self.parts if part.core]
        if OPPOSITE in core:
            return OPPOSITE
        if NOT_TESTABLE in core:
            return NOT_TESTABLE
        return SHOWN if {part.verdict for part in self.parts} <= {SHOWN, NOT_TESTABLE} else NOT_SHOWN

    @property
    def missing(self) -> str:
        """What would be needed to test the claim, where it cannot be."""
        texts = dict.fromkeys(part.missing for part in self.parts if part.core and part.verdict == NOT_TESTABLE)
        return "; ".join(texts) if self.verdict == NOT_TESTABLE else ""


def answer_claims(conditions: Sequence[Condition], onsets: Onsets, delta: float) -> list[Claim]:
    """The five claims, in order."""
    base = [run for run in runs_of(conditions) if run.is_base]
    answers = {
        "abrupt_rise": _abrupt_rise(base, onsets, delta),
        "loss_drop": _loss_drop(base, onsets, delta),
        **_capabilities(base, onsets, delta),
        **_suppression(conditions),
        "promotion": _promotion(conditions),
        **_release(conditions),
        "early_break": _early_break(conditions, onsets),
        "complexity": _complexity(base, onsets, delta),
    }
    values = {
        "min_runs": MIN_RUNS,
        "most": f"two thirds of the base runs (at least {MIN_RUNS})",
        "seeds": f"{MIN_RUNS} whole runs (seeds) each, not all alike",
        "holm": "p < 0.05, Holm-corrected over the conditions tested for this",
        "abrupt_share": ABRUPT_SHARE,
        "short_window": SHORT_WINDOW,
        "delta": delta,
        "two_deltas": 2 * delta,
    }

    def part(answer: Answer, statement: str, rule: str, missing: str, core: bool = True) -> Part:
        missing = (answer.missing or missing.format(**values)) if answer.verdict == NOT_TESTABLE else ""
        return Part(statement, rule.format(**values), answer.verdict, answer.evidence, missing, core)

    texts = yaml.safe_load((files(__package__) / "claims.yaml").read_text(encoding="utf-8"))
    return [
        Claim(number, c["name"], c["statement"], [part(answers[key], **text) for key, text in c["parts"].items()])
        for number, c in enumerate(texts, start=1)
    ]


def enough(count: int, of: int) -> bool:
    """Whether `count` of a condition's runs speak for the condition."""
    return count >= max(MIN_RUNS, DETECTED_SHARE * of - 1e-9)


def _abrupt_rise(base: Sequence[Run], onsets: Onsets, delta: float) -> Answer:
    usable = _usable(base, delta, UAS)
    if not usable:
        return UNTESTED
    shares = {run.path: steepest_share(run.metric(UAS)) for run in usable}
    detected = [shares[run.path] for run, _ in detected_onsets(onsets, usable, UAS)]
    low, high = f"{min(shares.values()):.0%}", f"{max(shares.values()):.0%}"
    evidence = [
        f"UAS breaks clearly in {len(detected)} of {len(usable)} runs.",
        f"The steepest {SHORT_WINDOW:.0%} of training holds {low if low == high else f'{low} to {high}'} of its rise.",
    ]
    abrupt = sum(share >= ABRUPT_SHARE for share in detected)
    return Answer(SHOWN if enough(abrupt, len(usable)) else NOT_SHOWN, evidence)


def _loss_drop(base: Sequence[Run], onsets: Onsets, delta: float) -> Answer:
    usable = _usable(base, delta, UAS, LOSS)
    if not usable:
        return UNTESTED
    pairs = [both for _, both in detected_onsets(onsets, usable, LOSS, UAS)]
    evidence = [f"Both break clearly in {len(pairs)} of {len(usable)} runs."]
    if not enough(len(pairs), len(usable)):
        return Answer(NOT_SHOWN, evidence)
    verdict, text = _coincide(pairs, delta, 0.9)
    return Answer(verdict, [*evidence, f"The loss breaks at UAS's onset {text}."])


def _capabilities(base: Sequence[Run], onsets: Onsets, delta: float) -> dict[str, Answer]:
    """Whether BLiMP breaks, whether structure comes first, and whether capabilities follow soon."""
    usable = _usable(base, delta, BLIMP, UAS)
    if not usable:
        return dict.fromkeys(("upward", "structure_first", "soon"), UNTESTED)
    detected, order = len(detected_onsets(onsets, usable, BLIMP)), order_of(usable, onsets)
    evidence = [f"BLiMP breaks clearly in {detected} of {len(usable)} runs."]
    upward = Answer(SHOWN if enough(detected, len(usable)) else NOT_SHOWN, evidence)
    both = 0 if order is None else len(order.runs)
    if not enough(both, len(usable)):
        few = Answer(NOT_SHOWN, [f"Both break clearly in {both} of {len(usable)} runs."])
        return {"upward": upward, "structure_first": few, "soon": few}
    lag = order.lag
    evidence = [
        f"BLiMP's onset minus UAS's is {true_minus(f'{lag.mean:.0f}')} steps on average (95 % interval over {both} "
        f"seeds {show_interval(lag.interval(0.95))}); UAS is first in {order.first}, last in {order.last} runs."
    ]
    if order.items:
        evidence.append(f"Over resampled items the mean lag is {show_interval(order.items)} steps (95 %).")
    if abs(lag.mean) < order.spacing:
        evidence.append(f"This is less than one evaluation interval ({order.spacing:g} steps).")
    first = (SHOWN if lag.mean > 0 else OPPOSITE) if order.established else NOT_SHOWN
    upper = lag.interval(0.9)[1]
    soon = SHOWN if first == SHOWN and upper <= 2 * delta else NOT_SHOWN
    limit = true_minus(f"Upper end of the mean lag: {upper:.0f} steps; 2Δ = {2 * delta:g}.")
    return {"upward": upward, "structure_first": Answer(first, evidence), "soon": Answer(soon, [limit])}


def _complexity(base: Sequence[Run], onsets: Onsets, delta: float) -> Answer:
    usable = _usable(base, delta, TWONN, UAS)
    if not usable:
        return UNTESTED
    firsts = {run.path: first_break(run.metric(TWONN), delta) for run in usable}
    detected = [run for run in usable if firsts[run.path][0].detected]
    upward = sum(firsts[run.path][1] > 0 for run in detected)
    evidence = [
        f"TwoNN breaks clearly in {len(detected)} of {len(usable)} runs ({upward} upward, {len(detected) - upward} "
        "downward)."
    ]
    verdicts = []
    for metric, title in ((UAS, "structure"), (BLIMP, "capabilities")):
        pairs = [(firsts[run.path][0], onset) for run, (onset,) in detected_onsets(onsets, detected, metric)]
        if enough(len(pairs), len(usable)):
            verdict, text = _coincide(pairs, delta, 0.95)
            evidence.append(f"Distance to {title} onset: {text}.")
        else:
            verdict = NOT_SHOWN
            evidence.append(f"Both it and {title} break clearly in {len(pairs)} of {len(usable)} runs.")
        verdicts.append(verdict)
    return Answer(SHOWN if SHOWN in verdicts else OPPOSITE if set(verdicts) == {OPPOSITE} else NOT_SHOWN, evidence)


def _suppression(conditions: Sequence[Condition]) -> dict[str, Answer]:
    """Whether suppression that lowers UAS lowers BLiMP, and whether its controls do not."""
    uas, blimp = (_to_base(conditions, "suppress", metric) for metric in (UAS, BLIMP))
    tested = [label for label in uas if label in blimp]
    effective = [label for label in tested if uas[label].sign_shown() < 0]
    affected = [label for label in effective if blimp[label].sign_shown() < 0]
    evidence = [describe(tests[label]) for label in tested for tests in (uas, blimp)]
    if effective:
        grammar = Answer(_judge([blimp[label] for label in effective], -1), evidence)
    elif tested:
        missing = "a λ that lowers UAS: in no condition with λ > 0 is it lower than the base's beyond chance"
        grammar = Answer(NOT_TESTABLE, evidence, missing)
    else:
        grammar = UNTESTED
    return {"grammar": grammar, "syntax": _syntax(conditions, affected)}


def _syntax(conditions: Sequence[Condition], affected: Sequence[str]) -> Answer:
    """Whether the BLiMP of the `affected` conditions is lower than that of their controls."""
    if not affected:
        return Answer(NOT_TESTABLE, missing="an effect to explain")
    tests = _tested(compare(c, control, BLIMP) for c, control in control_pairs(conditions) if c.label in affected)
    if not tests:
        return UNTESTED
    signs = [{test.sign_shown() for test in tests if test.left == label} for label in affected]
    verdict = SHOWN if {-1} in signs else OPPOSITE if any(1 in s for s in signs) else NOT_SHOWN
    return Answer(verdict, [describe(test) for test in tests])


def _promotion(conditions: Sequence[Condition]) -> Answer:
    tests = _to_base(conditions, "promote", LOSS).values()
    return Answer(_judge(tests, 1), [describe(test) for test in tests]) if tests else UNTESTED


def _release(conditions: Sequence[Condition]) -> dict[str, Answer]:
    """Whether some brief suppression helps, and whether some does harm."""
    tests = _to_base(conditions, "release", LOSS).values()
    signs, evidence = {test.sign_shown() for test in tests}, [describe(test) for test in tests]
    helps = SHOWN if -1 in signs else OPPOSITE if signs == {1} else NOT_SHOWN
    return {
        "release_helps": Answer(helps, evidence) if tests else UNTESTED,
        "release_harms": Answer(SHOWN if 1 in signs else NOT_SHOWN, evidence) if len(tests) > 1 else UNTESTED,
    }


def _early_break(conditions: Sequence[Condition], onsets: Onsets) -> Answer:
    """When the loss breaks under suppression and in the base, where it does clearly in most runs of both."""
    compared, spacing = [], {}
    for c in conditions:
        if c.role != "suppress" or c.base is None:
            continue
        groups = (c.runs, c.base.runs)
        detected = [detected_onsets(onsets, group, LOSS) for group in groups]
        if all(enough(len(some), len(group)) for some, group in zip(detected, groups, strict=True)):
            spacing[c.label] = widest(loss for some in detected for _, (loss,) in some)
            sides = [[(run.seed, loss.step) for run, (loss,) in some] for some in detected]
            value = onset_difference(difference(*sides), spacing[c.label])
            compared.append(Comparison(c.label, c.base.label, LOSS_ONSET, value))
    tests = _tested(compared)
    if not tests:
        return UNTESTED
    evidence = [
        f"In {test.left} the loss breaks {abs(test.value.mean):.0f} ± {test.value.error:.0f} steps "
        f"{'earlier' if test.value.mean < 0 else 'later'} than in {test.right} "
        f"(p {show_p(test.value.p)}, corrected {show_p(test.holm)})."
        for test in tests
    ]
    return Answer(_judge([t for t in tests if abs(t.value.mean) >= spacing[t.left]], -1), evidence)


def describe(comparison: Comparison) -> str:
    """A comparison in words."""
    value, p = comparison.value, "no test"
    if value.p is not None:
        corrected = "" if comparison.holm is None else f", corrected {show_p(comparison.holm)}"
        p = f"p {show_p(value.p)}{corrected}; {'paired by seed' if value.paired else 'Welch'}"
    what = f"{comparison.left} minus {comparison.right}, {comparison.metric.title}"
    return f"{what}: {show(value, signed=True)} ({p})."


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
    detected = [bend for bend in both if bend[0].detected]
    if detected:
        return min(detected, key=lambda bend: bend[0].step)
    return max(both, key=lambda bend: bend[0].strength or 0)


def _coincide(pairs: Sequence[Sequence[Onset]], delta: float, confidence: float) -> tuple[str, str]:
    """Whether first - second onset is on average within ±Δ (`confidence`) or outside (95 %): verdict, and in words."""
    spacing = widest(onset for pair in pairs for onset in pair)
    distance = mean_distance([first.step - second.step for first, second in pairs], spacing)
    low, high = distance.interval(confidence)
    wide_low, wide_high = distance.interval(0.95)
    outside = wide_low > delta or wide_high < -delta
    verdict = SHOWN if -delta <= low and high <= delta else OPPOSITE if outside else NOT_SHOWN
    interval = f"{confidence:.0%} interval {show_interval((low, high), '+.0f')}"
    return verdict, f"{true_minus(f'{distance.mean:+.0f}')} steps ({interval}, Δ = {delta:g})"


def _usable(runs: Sequence[Run], delta: float, *metrics: Metric) -> list[Run]:
    """The runs whose curves are long enough for a break at scale Δ to exist; [] where fewer than `MIN_RUNS` are."""

    def spans(curve: Curve) -> bool:
        return len(curve) >= 3 and curve.steps[-1] - curve.steps[0] >= 2 * delta

    usable = [run for run in runs if all(spans(run.metric(metric)) for metric in metrics)]
    return usable if len(usable) >= MIN_RUNS else []


def _tested(comparisons: Iterable[Comparison | None]) -> list[Comparison]:
    """The comparisons that could be tested, corrected together."""
    return [c for c in correct(comparisons) if c.holm is not None]


def _to_base(conditions: Sequence[Condition], role: str, metric: Metric) -> dict[str, Comparison]:
    """The tests of the conditions of a role against the base, by label."""
    return {c.left: c for c in _tested(compare(c, c.base, metric) for c in conditions if c.role == role)}


def _judge(tests: Iterable[Comparison], sign: int) -> str:
    """Shown where a test has this sign, opposite where one has the other."""
    signs = {test.sign_shown() for test in tests}
    return SHOWN if sign in signs else OPPOSITE if -sign in signs else NOT_SHOWN
