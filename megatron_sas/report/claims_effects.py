"""Claims about what a regularizer does to the result: 3 (suppression and promotion), 4 (brief suppression)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megatron_sas.evaluation.base import Metric
from megatron_sas.evaluation.minimal_pairs import BLIMP
from megatron_sas.evaluation.uas import UAS
from megatron_sas.evaluation.validation import LOSS
from megatron_sas.report.claims import MIN_RUNS, NOT_SHOWN, NOT_TESTABLE, OPPOSITE, SHOWN, Claim, Part, enough
from megatron_sas.report.comparisons import (
    Comparison,
    Condition,
    base_name,
    compare,
    control_pairs,
    correct,
    runs_of,
    whole_runs,
)
from megatron_sas.report.run_onsets import Onsets, detected_onset, onset_difference, widest
from megatron_sas.report.statistics import difference

LOSS_ONSET = Metric("", title="loss onset", name="loss_onset", direction=-1)
SEEDS = f"{MIN_RUNS} whole runs (seeds) each, not all alike"
HOLM = "p < 0.05, Holm-corrected over the conditions tested for this"


def regularized_runs(conditions: Sequence[Condition]) -> Claim:
    """Claim 3: suppression costs grammar, promotion costs loss; and whether the former is about syntax."""
    statement = (
        "Suppressing SAS (SAS−, λ > 0) stops grammar from developing; promoting it (SAS+, λ < 0) also costs loss."
    )
    grammar, affected = _grammar_suffers(conditions)
    parts = [grammar, _promotion_costs(conditions), _is_syntax(conditions, affected)]
    return Claim(3, "Suppression and promotion", statement, parts)


def brief_suppression(conditions: Sequence[Condition], onsets: Onsets) -> Claim:
    """Claim 4: letting go of a brief suppression beats never suppressing; late release harms; its early loss break."""
    release = [c for c in conditions if c.role == "release"]
    tests = _family(_to_base(c, conditions, LOSS) for c in release)
    signs = {label: test.sign_shown() for label, test in tests.items()}
    statement = (
        "Suppressing SAS briefly and then releasing it gives a better model than never suppressing it; released late, "
        "or amid its own early loss break, it does harm."
    )
    better_rule = (
        f"a condition that releases λ ends with a lower MLM loss than the base ({HOLM}); "
        "every such condition with a higher one: opposite"
    )
    harm_rule = (
        f"with two or more release steps: one of these conditions ends with a higher MLM loss than the base ({HOLM})"
    )
    name, harm = "Brief suppression gives a lower loss.", "Some release does harm."
    missing = f"a base and a condition that releases λ > 0, with {SEEDS}"
    evidence = [describe(test) for test in tests.values()]
    if not signs:
        better = Part(name, better_rule, NOT_TESTABLE, missing=missing)
    else:
        verdict = SHOWN if -1 in signs.values() else OPPOSITE if set(signs.values()) == {1} else NOT_SHOWN
        better = Part(name, better_rule, verdict, evidence)
    if len(signs) < 2:
        late = Part(
            harm,
            harm_rule,
            NOT_TESTABLE,
            missing=missing.replace("a condition that releases", "two conditions that release"),
            core=False,
        )
    else:
        late = Part(harm, harm_rule, SHOWN if 1 in signs.values() else NOT_SHOWN, evidence, core=False)
    return Claim(4, "Brief suppression", statement, [better, late, _early_break(conditions, onsets)])


def describe(comparison: Comparison) -> str:
    """A comparison in words."""
    value = comparison.value
    error = "" if value.error is None else f" ± {value.error:.3f}"
    if value.p is None:
        p = "no test"
    else:
        corrected = "" if comparison.holm is None else f", corrected {show_p(comparison.holm)}"
        p = f"p {show_p(value.p)}{corrected}; {'paired by seed' if value.paired else 'Welch'}"
    text = f"{value.mean:+.3f}{error}".replace("-", "−")
    return f"{comparison.left} minus {comparison.right}, {comparison.metric.title}: {text} ({p})."


def show_p(p: float) -> str:
    """A p-value with its relation sign."""
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def _grammar_suffers(conditions: Sequence[Condition]) -> tuple[Part, list[Condition]]:
    """The part about BLiMP under suppression, and the conditions that show it."""
    name = "Suppression of SAS lowers BLiMP."
    rule = (
        f"a condition with λ > 0 throughout whose UAS is lower than the base's ({HOLM}) also ends with lower BLiMP "
        "(likewise); higher BLiMP: opposite; without lower UAS nothing was suppressed, and nothing is tested"
    )
    suppress = [c for c in conditions if c.role == "suppress"]
    uas, blimp = (_family(_to_base(c, conditions, metric) for c in suppress) for metric in (UAS, BLIMP))
    tested = [c for c in suppress if c.label in uas and c.label in blimp]
    if not tested:
        missing = f"a base and a condition with λ > 0 throughout, with UAS and BLiMP and {SEEDS}"
        return Part(name, rule, NOT_TESTABLE, missing=missing), []
    evidence = [describe(tests[c.label]) for c in tested for tests in (uas, blimp)]
    effective = [c for c in tested if uas[c.label].sign_shown() < 0]
    if not effective:
        missing = "a λ that lowers UAS: in no condition with λ > 0 is it lower than the base's beyond chance"
        return Part(name, rule, NOT_TESTABLE, evidence, missing), []
    affected = [c for c in effective if blimp[c.label].sign_shown() < 0]
    higher = any(blimp[c.label].sign_shown() > 0 for c in effective)
    return Part(name, rule, SHOWN if affected else OPPOSITE if higher else NOT_SHOWN, evidence), affected


def _promotion_costs(conditions: Sequence[Condition]) -> Part:
    name = "Promotion of SAS costs loss."
    rule = f"a condition with λ < 0 throughout ends with a higher MLM loss than the base ({HOLM}); lower: opposite"
    tests = _family(_to_base(c, conditions, LOSS) for c in conditions if c.role == "promote")
    if not tests:
        missing = f"a base and a condition with λ < 0 throughout, with {SEEDS}"
        return Part(name, rule, NOT_TESTABLE, missing=missing)
    signs = [test.sign_shown() for test in tests.values()]
    verdict = SHOWN if 1 in signs else OPPOSITE if -1 in signs else NOT_SHOWN
    return Part(name, rule, verdict, [describe(test) for test in tests.values()])


def _is_syntax(conditions: Sequence[Condition], affected: Sequence[Condition]) -> Part:
    name = "The loss of grammar is specific to syntax."
    rule = (
        "a condition that shows the effect on BLiMP has controls (the same λ on permuted heads, fixed offsets, random "
        "trees), and its BLiMP is lower than that of each of them that can be tested (p < 0.05, Holm-corrected over "
        "these comparisons); higher than one of them: opposite"
    )
    whole = whole_runs(runs_of(conditions), BLIMP)
    labels = {c.label for c in affected}
    pairs = [(c, d) for c, d in control_pairs(conditions) if c.label in labels]
    compared = [compare(c.label, c.runs, d.label, d.runs, BLIMP, whole) for c, d in pairs]
    tests = correct([test for test in compared if test is not None and test.value.p is not None])
    if not tests:
        missing = f"controls with the same λ and {SEEDS}"
        return Part(name, rule, NOT_TESTABLE, missing=missing if labels else "an effect to explain", core=False)
    signs = [{test.sign_shown() for test in tests if test.left == label} for label in labels]
    verdict = SHOWN if {-1} in signs else OPPOSITE if any(1 in s for s in signs) else NOT_SHOWN
    return Part(name, rule, verdict, [describe(test) for test in tests], core=False)


def _early_break(conditions: Sequence[Condition], onsets: Onsets) -> Part:
    name = "The suppressed run has an early loss break of its own."
    rule = (
        "in most runs of a condition with λ > 0 throughout and of the base the loss breaks clearly, in the former "
        f"earlier ({HOLM}), by at least one evaluation interval; later: opposite"
    )
    tests = _family(_onset_difference(c, conditions, onsets) for c in conditions if c.role == "suppress")
    if not tests:
        missing = f"{MIN_RUNS} runs each of the base and of a condition with λ > 0 throughout whose loss breaks clearly"
        return Part(name, rule, NOT_TESTABLE, missing=missing, core=False)
    resolution = {c.label: _loss_spacing(c, conditions, onsets) for c in conditions}
    signs = [test.sign_shown() if abs(test.value.mean) >= resolution[test.left] else 0 for test in tests.values()]
    verdict = SHOWN if -1 in signs else OPPOSITE if 1 in signs else NOT_SHOWN
    evidence = [
        f"In {test.left} the loss breaks {abs(test.value.mean):.0f} ± {test.value.error:.0f} steps "
        f"{'earlier' if test.value.mean < 0 else 'later'} than in {test.right} "
        f"(p {show_p(test.value.p)}, corrected {show_p(test.holm)})."
        for test in tests.values()
    ]
    return Part(name, rule, verdict, evidence, core=False)


def _onset_difference(condition: Condition, conditions: Sequence[Condition], onsets: Onsets) -> Comparison | None:
    """The condition's loss onset minus the base's; None unless most runs of both break clearly."""
    sides = []
    for group in (condition.runs, [run for run in runs_of(conditions) if run.is_base]):
        steps = [(run.seed, onset.step) for run in group if (onset := detected_onset(onsets, run, LOSS)) is not None]
        if not enough(len(steps), len(group)):
            return None
        sides.append(steps)
    value = onset_difference(difference(*sides), _loss_spacing(condition, conditions, onsets))
    return Comparison(condition.label, base_name(runs_of(conditions)), LOSS_ONSET, value)


def _loss_spacing(condition: Condition, conditions: Sequence[Condition], onsets: Onsets) -> float:
    """The widest distance of evaluations around the clear onsets of the loss in the condition and the base."""
    runs = [*condition.runs, *(run for run in runs_of(conditions) if run.is_base)]
    return widest([onset for run in runs if (onset := detected_onset(onsets, run, LOSS)) is not None])


def _to_base(condition: Condition, conditions: Sequence[Condition], metric: Metric) -> Comparison | None:
    runs = runs_of(conditions)
    base = [run for run in runs if run.is_base]
    return compare(condition.label, condition.runs, base_name(runs), base, metric, whole_runs(runs, metric))


def _family(comparisons: Iterable[Comparison | None]) -> dict[str, Comparison]:
    """The comparisons that could be tested, corrected together, by condition."""
    return {c.left: c for c in correct([c for c in comparisons if c is not None and c.value.p is not None])}
