"""What happened in plain sentences: onsets, their order, final values, and what a reader must know besides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_sas.core.cli import listed
from megatron_sas.evaluation.base import Metric
from megatron_sas.evaluation.minimal_pairs import BLIMP
from megatron_sas.evaluation.uas import UAS
from megatron_sas.report.comparisons import WHOLE, Comparison, Condition, runs_of, whole_runs
from megatron_sas.report.run_onsets import Onsets, Order, RunOnset, mean_step, order_of
from megatron_sas.report.trajectories import METRICS


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
        sentences = [_onset_sentence(condition, onsets), *_order_sentence(condition, onsets), *_uas_sentence(condition)]
        findings.append(Finding(condition.label, " ".join(sentences)))
    for condition in conditions:
        if condition.difference:
            differences = list(condition.difference.values())
            findings.append(Finding(condition.label, _difference_sentence("the base (λ = 0)", differences)))
    for left, right in dict.fromkeys((c.left, c.right) for c in to_controls):
        differences = [c for c in to_controls if (c.left, c.right) == (left, right)]
        findings.append(Finding(left, _difference_sentence(f"{right} (the same λ)", differences)))
    return findings


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
    runs = runs_of(conditions)
    unfinished = [run for run in runs if run.planned_steps and run.final_step < run.planned_steps]
    if unfinished:
        names = [f"{run.label}/{run.name} ({run.final_step} of {run.planned_steps})" for run in unfinished]
        notes.append(f"Not finished: {listed(names)}.")
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
    notes, runs = [], runs_of(conditions)
    ending: dict[str, list[str]] = {}  # titles of metrics by the runs where they end early, which are often the same
    for metric in METRICS:
        whole = whole_runs(runs, metric)
        curves = [(run, run.metric(metric)) for run in runs]
        without = [f"{run.label}/{run.name}" for run, curve in curves if not len(curve)]
        if without and len(without) < len(runs):
            notes.append(f"{metric.title} was not evaluated in {listed(without)}.")
        early = [(run, curve) for run, curve in curves if len(curve) and str(run.path) not in whole]
        if early:
            steps = [f"{run.label}/{run.name} (step {curve.steps[-1]:.0f})" for run, curve in early]
            ending.setdefault(listed(steps), []).append(metric.title)
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
        group = [onsets[str(run.path)][metric.name] for run in condition.runs if metric.name in onsets[str(run.path)]]
        if group:
            parts.append(_describe(metric, group))
    runs = "" if len(condition.runs) == 1 else f" ({len(condition.runs)} runs)"
    return f"In {condition.label}{runs}, {_join(parts)}."


def _describe(metric: Metric, group: Sequence[RunOnset]) -> str:
    """One metric's onset over the runs of a condition, as a clause."""
    way = "upward" if metric.direction > 0 else "downward"
    detected = [onset.strongest for onset in group if onset.strongest.detected]
    steps = mean_step(detected) if detected else None
    if len(group) == 1:
        strongest, items, fit = group[0].strongest, group[0].interval, group[0].change_interval
        if strongest.step is None:
            return f"{metric.title} shows no break: {strongest.reason}"
        if steps:
            over = [f"95 % over items {items[0]:g} to {items[1]:g}"] if items else []
        else:
            doubt = f": {strongest.reason}" if strongest.reason else ", could be noise"
            over = [f"its largest bend, {strongest.strength:.3f} at step {strongest.step:.0f}{doubt}"]
        over += [f"a fit of straight pieces breaks between steps {fit[0]:g} and {fit[1]:g}"] if fit else []
        what = f"breaks {way} at step {steps.mean:.0f}" if steps else "shows no clear break"
        return f"{metric.title} {what}" + (f" ({'; '.join(over)})" if over else "")
    if steps is None:
        return f"{metric.title} shows no clear break in any run"
    spread = "" if steps.error is None else f" ± {steps.error:.0f}"
    share = "" if len(detected) == len(group) else f" in {len(detected)} of {len(group)} runs"
    return f"{metric.title} breaks {way} at step {steps.mean:.0f}{spread}{share}"


def _order_sentence(condition: Condition, onsets: Onsets) -> list[str]:
    """Whether structure came before capability, where both onsets are clear."""
    order = order_of(condition.runs, onsets)
    if order is None:
        return []
    way = "before" if order.lag.mean > 0 else "after"
    if len(order.runs) > 1:
        low, high = order.lag.interval(0.95)
        over = f"95 % interval over seeds {low:.0f} to {high:.0f}".replace("-", "−")
        doubt = "" if order.established else ", so no order is established"
        return [
            f"Structure (UAS) breaks {abs(order.lag.mean):.0f} ± {order.lag.error:.0f} steps {way} capability (BLiMP): "
            f"first in {order.first} and last in {order.last} of {len(order.runs)} runs ({over}){doubt}."
        ]
    return [_order_of_one(order, onsets, way)]


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
    uas, blimp = (onsets[str(only.run.path)][metric.name].change_interval for metric in (UAS, BLIMP))
    overlap = uas and blimp and uas[0] < blimp[1] and blimp[0] < uas[1]
    doubt = "; the intervals of their change points overlap, so the order is uncertain" if overlap else ""
    return f"{text}{doubt}."


def _uas_sentence(condition: Condition) -> list[str]:
    """UAS at the end beside what it must be compared with: the best of the untrained heads, and fixed offsets."""
    if UAS.name not in condition.final:
        return []
    runs = condition.ending[UAS.name]
    curves = [run.metric(UAS) for run in runs]
    start = [curve.values[0] for curve in curves if curve.steps[0] == 0]
    baseline = [run.uas_baseline for run in runs if run.uas_baseline is not None]
    beside = []
    if start:
        beside.append(f"{np.mean(start):.3f} untrained")
    if baseline:
        beside.append(f"{np.mean(baseline):.3f} for the best fixed offsets")
    return [f"UAS ends at {condition.final[UAS.name].mean:.3f} ({', '.join(beside)})."] if beside else []


def _difference_sentence(beside: str, comparisons: Sequence[Comparison]) -> str:
    parts = []
    for comparison in comparisons:
        metric, value = comparison.metric, comparison.value
        spread = "" if value.error is None else f" ± {value.error:.3f}"
        if round(abs(value.mean), 3) == 0:
            parts.append(f"{metric.title} equal{spread and f' ({spread.strip()})'}")
            continue
        doubt = " (not significant in this table)" if value.p is not None and not comparison.sign_shown() else ""
        way = "lower" if value.mean < 0 else "higher"
        parts.append(f"{metric.title} {abs(value.mean):.3f}{spread} {way}{doubt}")
    return f"Compared with {beside}, {comparisons[0].left} ends with {_join(parts)}."


def _join(parts: Sequence[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))
