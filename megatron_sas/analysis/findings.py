"""What the curves say: onsets per run, final values per condition, and both in plain sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_sas.analysis.trajectories import METRICS, Metric, Run, conditions
from megatron_sas.evaluation.onsets import ChangePoint, Onset, break_point, change_point


@dataclass(frozen=True)
class RunOnset:
    """Both answers to when one curve of one run breaks."""

    bend: Onset
    change: ChangePoint

    @property
    def interval(self) -> tuple[float, float] | None:
        """The change point's interval, where there is one."""
        return None if self.change.low is None or self.change.high is None else (self.change.low, self.change.high)


@dataclass(frozen=True)
class Estimate:
    """Mean over runs and its standard error (None for a single run)."""

    mean: float
    error: float | None
    count: int


@dataclass(frozen=True)
class Condition:
    """Runs of one label: final values by metric name, and how they differ from the base."""

    label: str
    runs: list[Run]
    final: dict[str, Estimate]
    difference: dict[str, Estimate]

    @property
    def is_base(self) -> bool:
        """Whether λ is 0 throughout."""
        return self.runs[0].is_base


@dataclass(frozen=True)
class Finding:
    """Something to tell about a condition."""

    label: str
    text: str


Onsets = dict[str, dict[str, RunOnset]]  # run path -> metric name -> onset; metrics without a curve are absent


def default_delta(runs: Sequence[Run]) -> float:
    """A tenth of the shortest run, but no less than the widest usual gap between evaluations of any run."""
    gaps = [
        np.median(np.diff(run.curve(metric.key).steps)) for run in runs for metric in METRICS if _enough(run, metric)
    ]
    return float(max([min(run.final_step for run in runs) / 10, 1, *gaps]))


def find_onsets(runs: Sequence[Run], delta: float) -> Onsets:
    """Onsets of every curve of every run."""
    found: Onsets = {}
    for run in runs:
        curves = {metric: run.metric(metric) for metric in METRICS}
        found[str(run.path)] = {
            metric.name: RunOnset(
                break_point(curve.steps, curve.values, delta, metric.sign),
                change_point(curve.steps, curve.values, metric.sign),
            )
            for metric, curve in curves.items()
            if len(curve)
        }
    return found


def summarize(runs: Sequence[Run]) -> list[Condition]:
    """Final values per condition, base first; differences are to all runs with λ = 0 together."""
    base = [run for run in runs if run.is_base]
    result = []
    for label, group in conditions(runs).items():
        final, difference = {}, {}
        for metric in METRICS:
            values, reference = _final_values(group, metric), _final_values(base, metric)
            if values:
                final[metric.name] = estimate(values)
            if values and reference and not group[0].is_base:
                difference[metric.name] = _subtract(estimate(values), estimate(reference))
        result.append(Condition(label, group, final, difference))
    return result


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error of independent values."""
    count = len(values)
    error = float(np.std(values, ddof=1) / np.sqrt(count)) if count > 1 else None
    return Estimate(float(np.mean(values)), error, count)


def narrate(found: Sequence[Condition], onsets: Onsets) -> list[Finding]:
    """Plain sentences about what happened, and what did not, computed from the data alone."""
    findings = []
    for condition in found:
        sentences = [_onset_sentence(condition, onsets), *_order_sentence(condition, onsets), *_uas_sentence(condition)]
        findings.append(Finding(condition.label, " ".join(sentences)))
    findings += [Finding(c.label, _difference_sentence(c)) for c in found if c.difference]
    return findings


def caveats(found: Sequence[Condition]) -> list[str]:
    """What a reader must know before believing the sentences of `narrate`."""
    notes = []
    if not any(condition.is_base for condition in found):
        notes.append("No run with λ = 0 was given, so nothing is compared with a base.")
    single = [condition.label for condition in found if len(condition.runs) == 1]
    if single:
        which = "each condition" if len(single) == len(found) else ", ".join(single)
        notes.append(
            f"There is a single run of {which}: differences may be chance between seeds, which one run cannot show."
        )
    last = sorted({run.final_step for condition in found for run in condition.runs})
    if len(last) > 1:
        notes.append(
            f"The runs do not end at the same step (they end at {last[0]} to {last[-1]}); "
            "final values are compared as they are."
        )
    missing = [m.title for m in METRICS if not any(m.name in condition.final for condition in found)]
    if missing:
        notes.append(f"Not evaluated in these runs: {', '.join(missing)}.")
    return notes


def _onset_sentence(condition: Condition, onsets: Onsets) -> str:
    parts = []
    for metric in METRICS:
        group = [onsets[str(run.path)][metric.name] for run in condition.runs if metric.name in onsets[str(run.path)]]
        if group:
            parts.append(_describe(metric, group))
    runs = "" if len(condition.runs) == 1 else f" ({len(condition.runs)} runs)"
    return f"In {condition.label}{runs}, {_join(parts)}."


def _describe(metric: Metric, group: Sequence[RunOnset]) -> str:
    """One metric's onset over the runs of a condition, as a clause."""
    way = "upward" if metric.sign > 0 else "downward"
    clear = [onset for onset in group if onset.bend.clear]
    steps = estimate([onset.bend.step for onset in clear]) if clear else None
    if len(group) == 1 and steps:
        interval = group[0].interval
        where = f" (change-point interval {interval[0]:g} to {interval[1]:g})" if interval else ""
        return f"{metric.title} breaks {way} at step {steps.mean:.0f}{where}"
    if len(group) == 1:
        bend = group[0].bend
        if bend.step is None:
            return f"{metric.title} shows no break: {bend.reason}"
        interval = group[0].interval
        fit = f"; a fit of straight pieces breaks between steps {interval[0]:g} and {interval[1]:g}" if interval else ""
        return (
            f"{metric.title} shows no clear break (its largest bend, {bend.strength:.3f} at step {bend.step:.0f}, "
            f"could be noise{fit})"
        )
    if steps is None:
        return f"{metric.title} shows no clear break in any run"
    spread = "" if steps.error is None else f" ± {steps.error:.0f}"
    share = "" if len(clear) == len(group) else f" in {len(clear)} of {len(group)} runs"
    return f"{metric.title} breaks {way} at step {steps.mean:.0f}{spread}{share}"


def _order_sentence(condition: Condition, onsets: Onsets) -> list[str]:
    """Whether structure came before capability, where both onsets are clear."""
    pairs = []
    for run in condition.runs:
        uas, blimp = (onsets[str(run.path)].get(name) for name in ("uas", "blimp"))
        if uas and blimp and uas.bend.clear and blimp.bend.clear:
            pairs.append((run, uas, blimp))
    if not pairs:
        return []
    lag = estimate([blimp.bend.step - uas.bend.step for _, uas, blimp in pairs])
    order = "before" if lag.mean > 0 else "after"
    if lag.error is not None:
        sure = (
            ""
            if abs(lag.mean) > 2 * lag.error
            else ", which is within twice its standard error: no order is established"
        )
        return [f"Structure (UAS) breaks {abs(lag.mean):.0f} ± {lag.error:.0f} steps {order} capability (BLiMP){sure}."]
    run, uas, blimp = pairs[0]
    spacing = max(np.median(np.diff(run.curve(key).steps)) for key in ("uas", "blimp"))
    if abs(lag.mean) < spacing:
        return [
            f"Structure (UAS) and capability (BLiMP) break within one evaluation interval "
            f"({spacing:g} steps), so their order cannot be told."
        ]
    overlap = (
        uas.interval and blimp.interval and uas.interval[0] < blimp.interval[1] and blimp.interval[0] < uas.interval[1]
    )
    doubt = "; their intervals overlap, so the order is uncertain" if overlap else ""
    return [f"Structure (UAS) breaks {abs(lag.mean):.0f} steps {order} capability (BLiMP){doubt}."]


def _uas_sentence(condition: Condition) -> list[str]:
    """UAS at the end beside what it must be compared with: the best of the untrained heads, and fixed offsets."""
    if "uas" not in condition.final:
        return []
    curves = [run.curve("uas") for run in condition.runs]
    start = [curve.values[0] for curve in curves if len(curve) and curve.steps[0] == 0]
    baseline = [run.uas_baseline for run in condition.runs if run.uas_baseline is not None]
    beside = []
    if start:
        beside.append(f"{np.mean(start):.3f} untrained")
    if baseline:
        beside.append(f"{np.mean(baseline):.3f} for the best fixed offsets")
    return [f"UAS ends at {condition.final['uas'].mean:.3f} ({', '.join(beside)})."] if beside else []


def _difference_sentence(condition: Condition) -> str:
    parts = []
    for metric in METRICS:
        difference = condition.difference.get(metric.name)
        if difference is None:
            continue
        spread = "" if difference.error is None else f" ± {difference.error:.3f}"
        if round(abs(difference.mean), 3) == 0:
            parts.append(f"{metric.title} equal{spread and f' ({spread.strip()})'}")
            continue
        doubt = ""
        if difference.error is not None and abs(difference.mean) <= 2 * difference.error:
            doubt = " (within twice its standard error)"
        way = "lower" if difference.mean < 0 else "higher"
        parts.append(f"{metric.title} {abs(difference.mean):.3f}{spread} {way}{doubt}")
    return f"Compared with the base (λ = 0), {condition.label} ends with {_join(parts)}."


def _subtract(left: Estimate, right: Estimate) -> Estimate:
    """Difference of independent means; its error is known only when both are."""
    error = None
    if left.error is not None and right.error is not None:
        error = float(np.hypot(left.error, right.error))
    return Estimate(left.mean - right.mean, error, min(left.count, right.count))


def _final_values(runs: Sequence[Run], metric: Metric) -> list[float]:
    curves = [run.metric(metric) for run in runs]
    return [float(curve.values[-1]) for curve in curves if len(curve)]


def _enough(run: Run, metric: Metric) -> bool:
    return len(run.curve(metric.key)) > 1


def _join(parts: Sequence[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))
