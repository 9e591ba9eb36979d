"""The figure: MLM loss, UAS and BLiMP over training, runs overlaid, onsets marked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import ScalarFormatter

from megatron_sas.analysis.findings import Onsets, RunOnset
from megatron_sas.analysis.trajectories import METRICS, Curve, Metric, Run, conditions

# Okabe and Ito's palette, which people with any of the common colour-vision deficiencies can tell apart.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")  # beyond seven conditions the colours repeat with another line
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a9199",
    "axes.labelcolor": "#333a41",
    "axes.grid": True,
    "grid.color": "#e6e9ec",
    "grid.linewidth": 0.8,
    "xtick.color": "#5b636b",
    "ytick.color": "#5b636b",
}


def draw(runs: Sequence[Run], onsets: Onsets, x_scale: str = "linear") -> Figure:
    """A figure with one panel per metric that any run has, and one for λ where it is not always 0.

    `x_scale` is "linear" or "log" (linear up to the first evaluation after step 0). Dashed lines mark clear
    onsets, bands their change-point intervals.
    """
    panels = [metric for metric in METRICS if any(len(run.metric(metric)) for run in runs)]
    with_weight = any(not run.is_base for run in runs)
    heights = [0.45] * with_weight + [1.6 if metric.name == "loss" else 1.2 for metric in panels]
    colours = label_styles(runs)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.5, 1.9 * sum(heights) + 0.9), dpi=150, layout="constrained")
        axes = np.atleast_1d(figure.subplots(len(heights), 1, sharex=True, height_ratios=heights))
        if with_weight:
            _draw_weight(axes[0], runs, colours)
        for axis, metric in zip(axes[with_weight:], panels, strict=True):
            _draw_metric(axis, metric, runs, onsets, colours)
        first = min((s for run in runs for s in (r["step"] for r in run.evaluations) if s > 0), default=1)
        if x_scale == "log":
            axes[-1].set_xscale("symlog", linthresh=first)
            axes[-1].xaxis.set_major_formatter(ScalarFormatter())
        axes[-1].set_xlim(0, max(1, *(run.final_step for run in runs)))
        axes[-1].set_xlabel("training step")
        figure.align_ylabels(axes)
        _legend(figure, colours, onsets)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG or SVG, by the path's suffix, without the time of writing in it."""
    with mpl.rc_context(STYLE):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {"Software": None})


def label_styles(runs: Sequence[Run]) -> dict[str, tuple[str, str]]:
    """Colour and line of each condition, in the order of `conditions`."""
    return {
        label: (PALETTE[i % len(PALETTE)], DASHES[i // len(PALETTE) % len(DASHES)])
        for i, label in enumerate(conditions(runs))
    }


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Mean over runs at the steps that all of them have."""
    steps = curves[0].steps
    for curve in curves[1:]:
        steps = np.intersect1d(steps, curve.steps)
    values = [curve.values[np.isin(curve.steps, steps)] for curve in curves]
    return Curve(steps, np.mean(values, axis=0))


def _draw_metric(
    axis: Axes, metric: Metric, runs: Sequence[Run], onsets: Onsets, styles: dict[str, tuple[str, str]]
) -> None:
    for label, group in conditions(runs).items():
        colour, dash = styles[label]
        curves = [curve for run in group if len(curve := run.metric(metric))]
        several = len(curves) > 1
        if metric.name == "loss":
            for run in group:
                train = run.curve("mlm_loss", "train")
                axis.plot(train.steps, train.values, color=colour, alpha=0.22, linewidth=0.8, zorder=1)
        for curve in curves:
            axis.plot(
                curve.steps,
                curve.values,
                color=colour,
                linestyle=dash,
                linewidth=0.8 if several else 1.8,
                alpha=0.45 if several else 1,
                marker=None if several or len(curve) > 60 else "o",
                markersize=2.6,
                zorder=3,
            )
        if several:
            mean = mean_curve(curves)
            axis.plot(mean.steps, mean.values, color=colour, linestyle=dash, linewidth=2.2, zorder=4)
        _mark_onset(axis, [onsets[str(run.path)].get(metric.name) for run in group], colour)
    baselines = {run.uas_baseline for run in runs} - {None}
    if metric.name == "blimp":
        _reference_line(axis, 0.5, "chance", right=True)
    if metric.name == "uas" and len(baselines) == 1:  # one treebank: one baseline
        _reference_line(axis, baselines.pop(), "fixed offsets")
    if metric.name == "uas":
        axis.set_ylim(bottom=0)
    axis.set_ylabel(metric.title)


def _reference_line(axis: Axes, value: float, text: str, right: bool = False) -> None:
    """A dotted horizontal line with its name at the end where curves are usually far from it."""
    axis.axhline(value, color="#6b737b", linewidth=0.9, linestyle=":", zorder=1)
    axis.annotate(
        text,
        (float(right), value),
        xycoords=("axes fraction", "data"),
        xytext=(-3 if right else 3, 2),
        textcoords="offset points",
        ha="right" if right else "left",
        color="#6b737b",
        fontsize=8,
    )


def _mark_onset(axis: Axes, group: Sequence[RunOnset | None], colour: str) -> None:
    """The mean of a condition's clear onsets; around one its interval, around several their range."""
    clear = [onset for onset in group if onset is not None and onset.bend.clear]
    if not clear:
        return
    steps = [onset.bend.step for onset in clear]
    band = (min(steps), max(steps)) if len(clear) > 1 else clear[0].interval
    axis.axvline(np.mean(steps), color=colour, linestyle=(0, (4, 3)), linewidth=1.1, zorder=2)
    if band:
        axis.axvspan(*band, color=colour, alpha=0.1, linewidth=0, zorder=0)


def _draw_weight(axis: Axes, runs: Sequence[Run], styles: dict[str, tuple[str, str]]) -> None:
    for label, group in conditions(runs).items():
        colour, dash = styles[label]
        weight = group[0].weight
        axis.step(weight.steps, weight.values, where="post", color=colour, linestyle=dash, linewidth=1.6)
        axis.fill_between(weight.steps, weight.values, step="post", color=colour, alpha=0.12, linewidth=0)
    axis.set_ylabel("λ")
    axis.margins(y=0.2)
    axis.locator_params(axis="y", nbins=3)


def _legend(figure: Figure, styles: dict[str, tuple[str, str]], onsets: Onsets) -> None:
    handles = [
        # A leading underscore would hide the entry, a dollar sign would start a formula.
        Line2D([], [], color=colour, linestyle=dash, linewidth=2.2, label=f" {label}".replace("$", r"\$"))
        for label, (colour, dash) in styles.items()
    ]
    if any(onset.bend.clear for by_metric in onsets.values() for onset in by_metric.values()):
        handles.append(Line2D([], [], color="#6b737b", linestyle=(0, (4, 3)), linewidth=1.1, label="onset"))
        handles.append(Patch(color="#6b737b", alpha=0.15, linewidth=0, label="its interval or range"))
    handles.append(Line2D([], [], color="#6b737b", alpha=0.35, linewidth=0.9, label="training loss"))
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 6), frameon=False, fontsize=9.5)
