"""What happened in plain sentences: onsets, their order, final values, and what a reader must know besides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_sas.core.cli import listed
from megatron_sas.evaluation.base import Metric
from megatron_sas.evaluation.minimal_pairs import BLIMP
from megatron_sas.evaluation.uas import UAS
from megatron_sas.report.comparisons import WHOLE, Comparison, Condition, runs_of
from megatron_sas.report.run_onsets import Onsets, Order, RunOnset, mean_step, order_of
from megatron_sas.report.statistics import show, show_interval
from megatron_sas.report.trajectories import METRICS, TABLE_METRICS


@dataclass(frozen=True)
class Finding:
    """Something to tell about a condition."""

    label: str
    text: str


def narrate(conditions: Sequence[Condition], onsets: Onsets, to_controls: Sequence[Comparison]) -> list[Finding]:
    """Plain sentences about what happened, and what did not, computed from the data alone.

    `to_controls` are those of `compare_to_controls`, with the same λ on either side.
    """
    findings = []
    for condition in conditions:
        sentences = [_onset_sentence(condition, onsets), _order_sentence(condition, onsets), _uas_sentence(condition)]
        findings.append(Finding(condition.label, " ".join(filter(None, sentences))))
    for condition in conditions:
        if condition.difference:
            differences = list(condition.difference.values())
            findings.append(Finding(condition.label, _difference_sentence("the base (λ = 0)", differences)))
    for left, right in dict.fromkeys((c.left, c.right) for c in to_controls):
        differences = [c for c in to_controls if (c.left, c.right) == (left, right)]
        findings.append(Finding(left, _difference_sentence(f"{right} (the same λ)", differences)))
    return findings


def headline(conditions: Sequence[Condition], onsets: Onsets) -> list[str]:
    """What happened in at most three sentences: when the base's curves break, in which order, and what λ changed."""
    base = next((condition for condition in conditions if condition.is_base), conditions[0])
    about_base = [_onset_sentence(base, onsets), _order_sentence(base, onsets) or _uas_sentence(base)]
    return list(filter(None, [*about_base, _changes_sentence(conditions)]))


def _changes_sentence(conditions: Sequence[Condition]) -> str:
    """In which conditions a metric ends lower or higher than in the base: significantly, where that can be tested."""
    comparisons = [c for condition in conditions for c in condition.difference.values()]
    if not comparisons:
        return ""
    tested = any(c.holm is not None for c in comparisons)
    parts = []
    for metric in TABLE_METRICS:
        for sign, way in ((-1, "lower"), (1, "higher")):
            labels = [
                c.left
                for c in comparisons
                if c.metric == metric and sign == (c.sign_shown() if tested else np.sign(round(c.value.mean, 3)))
            ]
            parts += [f"{metric.title} is {way} in {_join(labels)}"] if labels else []
    doubt = "" if tested else " (not tested)"
    none = "no difference is significant" if tested else "no metric differs"
    return f"Compared with the base{doubt}, {'; '.join(parts) or none}."


def caveats(conditions: Sequence[Condition]) -> list[str]:
    """What a reader must know before believing the sentences of `narrate`."""
    notes = []
    if not any(condition.is_base for condition in conditions):
        notes.append("No run with λ = 0 was given, so nothing is compared with a base.")
    single = [condition.label for condition in conditions if len(condition.runs) == 1]
    if single:
        which = "each condition" if len(single) == len(conditions) else ", ".join(single)
        notes.append(
            f"There is a single run of {which}: differences may be chance between seeds, which one run cannot show."
        )
    unfinished = [
        f"{run.label}/{run.name} ({run.final_step} of {run.planned_steps})"
        for run in runs_of(conditions)
        if run.final_step < run.length
    ]
    if unfinished:
        notes.append(f"Not finished: {listed(unfinished)}.")
    notes += _missing_values(conditions)
    for condition in conditions:
        seeds = Counter(run.seed for run in condition.runs if run.seed is not None)
        if alike := [str(seed) for seed, count in seeds.items() if count > 1]:
            notes.append(
                f"Runs of {condition.label} have the same seed ({', '.join(alike)}): they show less spread than seeds "
                "have, so errors and p are too small."
            )
        if len(schedules := {run.describe_schedule() for run in condition.runs}) > 1:
            notes.append(f"Runs of {condition.label} differ in λ: {'; '.join(sorted(schedules))}.")
    return notes


def _missing_values(conditions: Sequence[Condition]) -> list[str]:
    """Which metrics some runs do not have to the end, or at all."""
    notes = []
    ending: dict[str, list[str]] = {}  # titles of metrics by the runs where they end early, which are often the same
    for metric in METRICS:
        without, early = [], []
        for condition in conditions:
            whole = {run.path for run in condition.whole[metric.name]}
            for run in condition.runs:
                curve = run.metric(metric)
                if not len(curve):
                    without.append(f"{run.label}/{run.name}")
                elif run.path not in whole:
                    early.append(f"{run.label}/{run.name} (step {curve.steps[-1]:.0f})")
        if without and len(without) < len(runs_of(conditions)):
            notes.append(f"{metric.title} was not evaluated in {listed(without)}.")
        if early:
            ending.setdefault(listed(early), []).append(metric.title)
    for named, titles in ending.items():
        notes.append(
            f"{_join(titles)} end{'s' if len(titles) == 1 else ''} before {WHOLE:.0%} of the longest curve in {named}: "
            "no difference is taken with these runs, and means leave them out where the condition has others."
        )
    missing = [m.title for m in METRICS if not any(m.name in condition.final for condition in conditions)]
    if missing:
        notes.append(f"Not evaluated in these runs: {', '.join(missing)}.")
    return notes


def _onset_sentence(condition: Condition, onsets: Onsets) -> str:
    parts = []
    for metric in METRICS:
        group = [onsets[run.path][metric.name] for run in condition.runs if metric.name in onsets[run.path]]
        if group:
            clause = _describe_one(group[0], metric) if len(group) == 1 else _describe(group, metric)
            parts.append(f"{metric.title} {clause}")
    runs = "" if len(condition.runs) == 1 else f" ({len(condition.runs)} runs)"
    return f"In {condition.label}{runs}, {_join(parts)}."


def _describe_one(onset: RunOnset, metric: Metric) -> str:
    """The onset of a single run, as a clause."""
    strongest, fit = onset.strongest, onset.change.interval
    if strongest.step is None:
        return f"shows no break: {strongest.reason}"
    if strongest.detected:
        over = [f"95 % over items {show_interval(onset.interval, 'g')}"] if onset.interval else []
    else:
        over = [f"its largest bend, {strongest.strength:.3f} at step {strongest.step:.0f}: {strongest.reason}"]
    over += [f"a fit of straight pieces breaks between steps {fit[0]:g} and {fit[1]:g}"] if fit else []
    what = f"{_breaks(metric)} at step {strongest.step:.0f}" if strongest.detected else "shows no clear break"
    return what + (f" ({'; '.join(over)})" if over else "")


def _describe(group: Sequence[RunOnset], metric: Metric) -> str:
    """The onsets of a condition's runs, as a clause."""
    detected = [onset.strongest for onset in group if onset.strongest.detected]
    if not detected:
        return "shows no clear break in any run"
    share = "" if len(detected) == len(group) else f" in {len(detected)} of {len(group)} runs"
    return f"{_breaks(metric)} at step {show(mean_step(detected), 0)}{share}"


def _breaks(metric: Metric) -> str:
    return "breaks upward" if metric.direction > 0 else "breaks downward"


def _order_sentence(condition: Condition, onsets: Onsets) -> str:
    """Whether structure came before capability, where both onsets are clear."""
    order = order_of(condition.runs, onsets)
    if order is None:
        return ""
    way = "before" if order.lag.mean > 0 else "after"
    if len(order.runs) == 1:
        return _order_of_one(order, onsets, way)
    doubt = "" if order.established else ", so no order is established"
    lag = show(replace(order.lag, mean=abs(order.lag.mean)), 0)
    return (
        f"Structure (UAS) breaks {lag} steps {way} capability (BLiMP): first in {order.first} and last in {order.last} "
        f"of {len(order.runs)} runs (95 % interval over seeds {show_interval(order.lag.interval(0.95))}){doubt}."
    )


def _order_of_one(order: Order, onsets: Onsets, way: str) -> str:
    """The order in a single run, with what its items or its change points say about it."""
    (only,) = order.runs
    if abs(only.lag) < order.spacing:
        return (
            f"Structure (UAS) and capability (BLiMP) break within one evaluation interval ({order.spacing:g} steps), "
            "so their order cannot be told."
        )
    text = f"Structure (UAS) breaks {abs(only.lag):.0f} steps {way} capability (BLiMP)"
    share = only.share(1 if only.lag > 0 else -1)
    if share is not None:
        return f"{text}; so it does in {share:.0%} of the resamplings of sentences and pairs."
    uas, blimp = (onsets[only.run.path][metric.name].change.interval for metric in (UAS, BLIMP))
    overlap = uas and blimp and uas[0] < blimp[1] and blimp[0] < uas[1]
    doubt = "; the intervals of their change points overlap, so the order is uncertain" if overlap else ""
    return f"{text}{doubt}."


def _uas_sentence(condition: Condition) -> str:
    """UAS at the end beside what it must be compared with: the best of the untrained heads, and fixed offsets."""
    runs = condition.ending[UAS.name]
    curves = [run.metric(UAS) for run in runs]
    start = [curve.values[0] for curve in curves if curve.steps[0] == 0]
    baseline = [run.uas_baseline for run in runs if run.uas_baseline is not None]
    beside = [f"{np.mean(start):.3f} untrained"] if start else []
    beside += [f"{np.mean(baseline):.3f} for the best fixed offsets"] if baseline else []
    return f"UAS ends at {condition.final[UAS.name].mean:.3f} ({', '.join(beside)})." if beside else ""


def _difference_sentence(beside: str, comparisons: Sequence[Comparison]) -> str:
    parts = []
    for comparison in comparisons:
        title, value = comparison.metric.title, comparison.value
        if round(abs(value.mean), 3) == 0:
            parts.append(f"{title} equal" + ("" if value.error is None else f" (± {value.error:.3f})"))
            continue
        doubt = " (not significant in this table)" if value.p is not None and not comparison.sign_shown() else ""
        way = "lower" if value.mean < 0 else "higher"
        parts.append(f"{title} {show(replace(value, mean=abs(value.mean)))} {way}{doubt}")
    return f"Compared with {beside}, {comparisons[0].left} ends with {_join(parts)}."


def _join(parts: Sequence[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))
