"""The figure: MLM loss, UAS and BLiMP over training, runs overlaid, onsets marked."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from megatron_sas.evaluation.base import Metric
from megatron_sas.evaluation.uas import UAS
from megatron_sas.evaluation.validation import LOSS
from megatron_sas.objective.terms import TERMS
from megatron_sas.report.figures.style import (
    GREY,
    STYLE,
    condition_lines,
    draw_curves,
    draw_legend,
    label_styles,
    marker_of,
    new_figure,
    scale_steps,
)
from megatron_sas.report.run_onsets import Onsets, RunOnset
from megatron_sas.report.trajectories import METRICS, Run, group_by_condition


def draw(runs: Sequence[Run], onsets: Onsets, x_scale: str = "linear") -> Figure:
    """A figure with one panel per metric that any run has, and one for the λ of every term that is not always 0.

    Vertical lines mark the mean of a condition's clear onsets; dots at the foot of a panel are each run's onset, with
    its interval over items where there is one, one row per condition. Where colours repeat, lines and dots tell apart.
    """
    panels = [metric for metric in METRICS if any(len(run.metric(metric)) for run in runs)]
    steered = [name for name in TERMS if any(np.any(run.weight(name).values) for run in runs)]
    heights = [0.45] * len(steered) + [1.6 if metric == LOSS else 1.2 for metric in panels]
    colours = label_styles(runs)
    with mpl.rc_context(STYLE):
        figure = new_figure(9.5, 1.9 * sum(heights) + 0.9)
        axes = np.atleast_1d(figure.subplots(len(heights), 1, sharex=True, height_ratios=heights))
        for axis, name in zip(axes, steered, strict=False):
            _draw_weight(axis, name, runs, colours)
        for axis, metric in zip(axes[len(steered) :], panels, strict=True):
            _draw_metric(axis, metric, runs, onsets, colours)
        scale_steps(axes[-1], runs, x_scale)
        axes[-1].set_xlabel("training step")
        figure.align_ylabels(axes)
        _legend(figure, colours, onsets)
    return figure


def _draw_metric(
    axis: Axes, metric: Metric, runs: Sequence[Run], onsets: Onsets, styles: dict[str, tuple[str, str]]
) -> None:
    groups = group_by_condition(runs)
    for rank, (label, group) in enumerate(groups.items()):
        colour, dash = styles[label]
        curves = [curve for run in group if len(curve := run.metric(metric))]
        if metric == LOSS:
            for run in group:
                train = run.curve("mlm_loss", "train")
                axis.plot(train.steps, train.values, color=colour, alpha=0.22, linewidth=0.8, zorder=1)
        if curves:
            draw_curves(axis, curves, colour, dash)
        _mark_onsets(axis, [onsets[str(run.path)].get(metric.name) for run in group], colour, dash, rank / len(groups))
    baselines = {run.uas_baseline for run in runs} - {None}
    if metric.chance is not None:
        _reference_line(axis, metric.chance, "chance", right=True)
    if metric == UAS and len(baselines) == 1:  # one treebank: one baseline
        _reference_line(axis, baselines.pop(), "fixed offsets")
    if metric == UAS:
        axis.set_ylim(bottom=0)
    axis.set_ylabel(metric.title)


def _reference_line(axis: Axes, value: float, text: str, right: bool = False) -> None:
    """A dotted horizontal line with its name at the end where curves are usually far from it."""
    axis.axhline(value, color=GREY, linewidth=0.9, linestyle=":", zorder=1)
    axis.annotate(
        text,
        (float(right), value),
        xycoords=("axes fraction", "data"),
        xytext=(-3 if right else 3, 2),
        textcoords="offset points",
        ha="right" if right else "left",
        color=GREY,
        fontsize=8,
    )


def _mark_onsets(axis: Axes, group: Sequence[RunOnset | None], colour: str, dash: str, height: float) -> None:
    """The mean of a condition's clear onsets as a line, each run's as a dot at its foot (`height` 0 to 1)."""
    detected = [onset for onset in group if onset is not None and onset.strongest.detected]
    if not detected:
        return
    mean = np.mean([onset.strongest.step for onset in detected])
    axis.axvline(mean, color=colour, linestyle=dash, linewidth=1.1, alpha=0.7, zorder=2)
    across = axis.get_xaxis_transform()  # steps along x, share of the panel along y
    for rank, onset in enumerate(detected):
        y = 0.015 + 0.16 * (height + 0.1 * rank / len(detected))
        if onset.interval:
            axis.plot(onset.interval, [y, y], color=colour, linewidth=1.6, alpha=0.7, transform=across, zorder=5)
        axis.plot(onset.strongest.step, y, marker_of(dash), color=colour, markersize=3.2, transform=across, zorder=6)


def _draw_weight(axis: Axes, term: str, runs: Sequence[Run], styles: dict[str, tuple[str, str]]) -> None:
    for label, group in group_by_condition(runs).items():
        colour, dash = styles[label]
        weight = group[0].weight(term)
        axis.step(weight.steps, weight.values, where="post", color=colour, linestyle=dash, linewidth=1.6)
        axis.fill_between(weight.steps, weight.values, step="post", color=colour, alpha=0.12, linewidth=0)
    axis.set_ylabel("λ" if TERMS[term].syntactic else f"λ {term}")
    axis.margins(y=0.2)
    axis.locator_params(axis="y", nbins=3)


def _legend(figure: Figure, styles: dict[str, tuple[str, str]], onsets: Onsets) -> None:
    handles = condition_lines(styles)
    detected = [onset for by_metric in onsets.values() for onset in by_metric.values() if onset.strongest.detected]
    if detected:
        handles.append(Line2D([], [], color=GREY, marker="|", markersize=11, linestyle="", label="onset, mean"))
        over = ", 95 % over items" if any(onset.interval for onset in detected) else ""
        dot = {"color": GREY, "marker": "o", "markersize": 3.2, "linestyle": "-" if over else ""}
        handles.append(Line2D([], [], label=f"onset of a run{over}", **dot))
    handles.append(Line2D([], [], color=GREY, alpha=0.35, linewidth=0.9, label="training loss"))
    draw_legend(figure, handles)
