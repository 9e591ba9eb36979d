"""Curves over training: MLM loss, UAS and BLiMP with their onsets, measures of complexity, BLiMP by field."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from megatron_sas.evaluation.base import Metric
from megatron_sas.evaluation.minimal_pairs import BLIMP, FIELDS
from megatron_sas.evaluation.minimal_pairs import TERMS as BLIMP_TERMS
from megatron_sas.evaluation.registry import snapshot_metrics
from megatron_sas.evaluation.uas import UAS
from megatron_sas.evaluation.validation import LOSS
from megatron_sas.objective import along_edges
from megatron_sas.objective.terms import TERMS, syntactic_first
from megatron_sas.report.comparisons import Condition, runs_of
from megatron_sas.report.figures import style
from megatron_sas.report.run_onsets import Onsets, detected_onsets
from megatron_sas.report.trajectories import METRICS, Curve, Run

MAX_FIELDS = 12
PER_EDGE = Metric(along_edges.PER_EDGE.format(syntactic_first({name: name for name in TERMS})[0]), title="R per edge")
PANEL_HEIGHTS = {LOSS: 1.6, PER_EDGE: 0.8}


@style.applied
def draw(conditions: Sequence[Condition], onsets: Onsets, x_scale: str = "linear") -> Figure:
    """A figure with one panel per metric that any run has, and one for the λ of every term that is not always 0.

    Below UAS stands the probability that it is about: R per edge, of training batches, in mode max.

    Vertical lines mark the mean of a condition's clear onsets; dots at the foot of a panel are each run's onset, with
    its interval over items where there is one, one row per condition. Where colours repeat, lines and dots tell apart.
    """
    runs = runs_of(conditions)
    panels = [metric for metric in METRICS if any(len(run.metric(metric)) for run in runs)]
    steered = [name for name in TERMS if any(np.any(run.weight(name).values) for run in runs)]
    if UAS in panels and any(len(run.curve(PER_EDGE.key, "train")) for run in runs):
        panels.insert(panels.index(UAS) + 1, PER_EDGE)
    heights = [0.45] * len(steered) + [PANEL_HEIGHTS.get(metric, 1.2) for metric in panels]
    figure = style.new_figure(9.5, 1.9 * sum(heights) + 0.9)
    axes = np.atleast_1d(figure.subplots(len(heights), 1, sharex=True, height_ratios=heights))
    for axis, name in zip(axes, steered, strict=False):
        _draw_weight(axis, name, conditions)
    for axis, metric in zip(axes[len(steered) :], panels, strict=True):
        _draw_metric(axis, metric, conditions, onsets)
    _finish(figure, axes, conditions, x_scale)
    handles = style.condition_lines(conditions)
    detected = [onset for by_metric in onsets.values() for onset in by_metric.values() if onset.strongest.detected]
    if detected:
        handles.append(Line2D([], [], color=style.GREY, marker="|", markersize=11, linestyle="", label="onset, mean"))
        over = ", 95 % over items" if any(onset.interval for onset in detected) else ""
        dot = {"color": style.GREY, "marker": "o", "markersize": 3.2, "linestyle": "-" if over else ""}
        handles.append(Line2D([], [], label=f"onset of a run{over}", **dot))
    handles.append(Line2D([], [], color=style.GREY, alpha=0.35, linewidth=0.9, label="training loss"))
    style.draw_legend(figure, handles)
    return figure


@style.applied
def draw_complexity(conditions: Sequence[Condition], onsets: Onsets, x_scale: str = "linear") -> Figure | None:
    """A panel per measure that any run has (intrinsic dimension, weight norm, attention entropy, attention to heads).

    Grey lines are the base's mean onsets of structure and capabilities.
    """
    runs = runs_of(conditions)
    panels = [m for m in snapshot_metrics() if m.axis and any(len(run.curve(m.key)) > 1 for run in runs)]
    if not panels:
        return None
    marks = []
    for metric, dash, name in ((UAS, "--", "structure onset (base)"), (BLIMP, ":", "capabilities onset (base)")):
        detected = detected_onsets(onsets, (run for run in runs if run.is_base), metric)
        marks += [(float(np.mean([onset.step for _, (onset,) in detected])), dash, name)] if detected else []
    figure = style.new_figure(9.5, 1.7 * len(panels) + 1.0)
    axes = np.atleast_1d(figure.subplots(len(panels), 1, sharex=True))
    for axis, metric in zip(axes, panels, strict=True):
        style.draw_conditions(axis, conditions, lambda run, key=metric.key: run.curve(key), least=2)
        for step, dash, _ in marks:
            axis.axvline(step, color=style.GREY, linestyle=dash, linewidth=1.2, zorder=2)
        axis.set_ylabel(metric.axis)
    _finish(figure, axes, conditions, x_scale)
    handles = [Line2D([], [], color=style.GREY, linestyle=dash, linewidth=1.2, label=name) for _, dash, name in marks]
    style.draw_legend(figure, [*style.condition_lines(conditions), *handles])
    return figure


@style.applied
def draw_fields_over_steps(conditions: Sequence[Condition], x_scale: str = "linear") -> Figure | None:
    """A panel per field, a curve per condition."""
    runs = runs_of(conditions)
    names = field_names(runs)
    if not names or not any(len(field_curve(run, names[0])) > 1 for run in runs):
        return None
    rows, columns = style.grid_shape(len(names))
    figure = style.new_figure(9.5, 2.3 * rows + 0.6)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axis, name in zip(axes.flat, names, strict=False):
        style.draw_conditions(axis, conditions, lambda run, name=name: field_curve(run, name))
        axis.axhline(BLIMP.chance, color=style.GREY, linewidth=0.9, linestyle=":")
        axis.set_title(style.plain(name.replace("_", " ")), fontsize=10)
    style.scale_steps(axes[0, 0], conditions, x_scale)
    style.finish_grid(axes, len(names))
    for axis in axes[:, 0]:
        axis.set_ylabel("accuracy")
    style.draw_legend(figure, style.condition_lines(conditions))
    return figure


def field_names(runs: Sequence[Run]) -> list[str]:
    """BLiMP's fields; where everything is of one field (or none is recorded), its terms."""
    fields, terms = (
        sorted({name for run in runs for name in run.nested(table.key)}) for table in (FIELDS, BLIMP_TERMS)
    )
    return (fields if len(fields) > 1 or len(terms) < 2 else terms)[:MAX_FIELDS]


def field_curve(run: Run, name: str) -> Curve:
    """Accuracy of a field or term over steps."""
    rows = [(r["step"], {**(r.get(BLIMP_TERMS.key) or {}), **(r.get(FIELDS.key) or {})}) for r in run.evaluations]
    return Curve.of([(step, row[name]) for step, row in rows if row.get(name) is not None])


def _finish(figure: Figure, axes: np.ndarray, conditions: Sequence[Condition], x_scale: str) -> None:
    """Steps below a column of panels."""
    style.scale_steps(axes[-1], conditions, x_scale)
    axes[-1].set_xlabel("training step")
    figure.align_ylabels(axes)


def _draw_metric(axis: Axes, metric: Metric, conditions: Sequence[Condition], onsets: Onsets) -> None:
    if metric == PER_EDGE:
        style.draw_conditions(axis, conditions, lambda run: run.curve(metric.key, "train"))
        axis.set_ylabel(metric.title)
        return
    style.draw_conditions(axis, conditions, lambda run: run.metric(metric))
    for rank, (condition, colour, dash) in enumerate(style.styled(conditions)):
        for run in condition.runs if metric == LOSS else ():
            train = run.curve("mlm_loss", "train")
            axis.plot(train.steps, train.values, color=colour, alpha=0.22, linewidth=0.8, zorder=1)
        _mark_onsets(axis, condition, metric, onsets, colour, dash, rank / len(conditions))
    baselines = {run.uas_baseline for run in runs_of(conditions)} - {None}
    if metric.chance is not None:
        _reference_line(axis, metric.chance, "chance", right=True)
    if metric == UAS and len(baselines) == 1:  # one treebank: one baseline
        _reference_line(axis, baselines.pop(), "fixed offsets")
    if metric == UAS:
        axis.set_ylim(bottom=0)
    axis.set_ylabel(metric.title)


def _reference_line(axis: Axes, value: float, text: str, right: bool = False) -> None:
    """A dotted horizontal line with its name at the end where curves are usually far from it."""
    axis.axhline(value, color=style.GREY, linewidth=0.9, linestyle=":", zorder=1)
    axis.annotate(
        text,
        (float(right), value),
        xycoords=("axes fraction", "data"),
        xytext=(-3 if right else 3, 2),
        textcoords="offset points",
        ha="right" if right else "left",
        color=style.GREY,
        fontsize=8,
    )


def _mark_onsets(
    axis: Axes, condition: Condition, metric: Metric, onsets: Onsets, colour: str, dash: str, height: float
) -> None:
    """The mean of a condition's clear onsets as a line, each run's as a dot at its foot (`height` 0 to 1)."""
    detected = detected_onsets(onsets, condition.runs, metric)
    if not detected:
        return
    mean = np.mean([onset.step for _, (onset,) in detected])
    axis.axvline(mean, color=colour, linestyle=dash, linewidth=1.1, alpha=0.7, zorder=2)
    across = axis.get_xaxis_transform()  # steps along x, share of the panel along y
    for rank, (run, (onset,)) in enumerate(detected):
        y = 0.015 + 0.16 * (height + 0.1 * rank / len(detected))
        if interval := onsets[run.path][metric.name].interval:
            axis.plot(interval, [y, y], color=colour, linewidth=1.6, alpha=0.7, transform=across, zorder=5)
        axis.plot(onset.step, y, style.marker_of(dash), color=colour, markersize=3.2, transform=across, zorder=6)


def _draw_weight(axis: Axes, term: str, conditions: Sequence[Condition]) -> None:
    for condition, colour, dash in style.styled(conditions):
        weight = condition.runs[0].weight(term)
        axis.step(weight.steps, weight.values, where="post", color=colour, linestyle=dash, linewidth=1.6)
        axis.fill_between(weight.steps, weight.values, step="post", color=colour, alpha=0.12, linewidth=0)
    axis.set_ylabel("λ" if TERMS[term].syntactic else f"λ {term}")
    axis.margins(y=0.2)
    axis.locator_params(axis="y", nbins=3)
