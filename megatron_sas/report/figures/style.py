"""What all figures share: colours of conditions, fonts, mean curves, and writing files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import ScalarFormatter

from megatron_sas.report.comparisons import Condition, runs_of
from megatron_sas.report.trajectories import Curve, Run

# Okabe and Ito's palette, which people with any of the common colour-vision deficiencies can tell apart.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")  # beyond seven conditions the colours repeat with another line
MARKERS = ("o", "s", "^", "D")  # and where there are no lines, with another marker
GREY = "#6b737b"
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
applied = mpl.rc_context(STYLE)
"""Decorates functions that draw: with `STYLE`."""


def new_figure(width: float, height: float) -> Figure:
    """An empty figure in inches; draw with STYLE `applied`."""
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


@applied
def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG or SVG, by the path's suffix, without the time of writing in it."""
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {"Software": None})


def styled(conditions: Sequence[Condition]) -> Iterator[tuple[Condition, str, str]]:
    """Each condition with its colour and line."""
    for i, condition in enumerate(conditions):
        yield condition, PALETTE[i % len(PALETTE)], DASHES[i // len(PALETTE) % len(DASHES)]


def marker_of(dash: str) -> str:
    """The marker that goes with a condition's line."""
    return MARKERS[DASHES.index(dash)]


def plain(text: str) -> str:
    """Text as matplotlib shows it literally: a dollar sign starts a formula, a leading underscore hides a label."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def condition_lines(conditions: Sequence[Condition]) -> list[Artist]:
    """A legend's entries for the lines of conditions."""
    return [
        Line2D([], [], color=colour, linestyle=dash, linewidth=2.2, label=plain(condition.label))
        for condition, colour, dash in styled(conditions)
    ]


def draw_legend(figure: Figure, handles: Sequence[Artist]) -> None:
    """A legend above everything else, in as many columns as the figure is wide enough for, at most five."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    for columns in range(max(1, min(len(handles), 5)), 0, -1):
        legend = figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False, fontsize=9.5)
        if columns == 1 or legend.get_window_extent(renderer).width <= figure.bbox.width:
            return
        legend.remove()


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Mean over runs, at every step that one of them has and all of them cover; between evaluations they are linear."""
    steps = np.unique(np.concatenate([curve.steps for curve in curves]))
    first, last = max(curve.steps[0] for curve in curves), min(curve.steps[-1] for curve in curves)
    steps = steps[(steps >= first) & (steps <= last)]
    return Curve(steps, np.mean([np.interp(steps, curve.steps, curve.values) for curve in curves], axis=0))


def draw_conditions(
    axis: Axes, conditions: Sequence[Condition], curve_of: Callable[[Run], Curve], least: int = 1
) -> None:
    """The curves of every condition that have at least `least` points: a line with dots for a single run, thin lines
    and their mean for several. Each condition is narrower than those below it, so curves that agree are all seen."""
    for rank, (condition, colour, dash) in enumerate(styled(conditions)):
        width = 2.8 - 1.4 * rank / max(1, len(conditions) - 1)
        curves = [curve for run in condition.runs if len(curve := curve_of(run)) >= least]
        several = len(curves) > 1
        for curve in curves:
            axis.plot(
                curve.steps,
                curve.values,
                color=colour,
                linestyle=dash,
                linewidth=0.8 if several else width,
                alpha=0.45 if several else 1,
                marker=None if several or len(curve) > 60 else "o",
                markersize=2.6,
                zorder=3,
            )
        if several:
            mean = mean_curve(curves)
            axis.plot(mean.steps, mean.values, color=colour, linestyle=dash, linewidth=width, zorder=4)


def grid_shape(panels: int) -> tuple[int, int]:
    """Rows and columns of a grid."""
    columns = min(3, panels)
    return -(-panels // columns), columns


def finish_grid(axes: np.ndarray, panels: int) -> None:
    """Of a grid `(rows, columns)` whose first panels are drawn: hide the others, and label steps below each column."""
    for axis in axes.flat[panels:]:
        axis.set_axis_off()
    for axis in axes.flat[max(0, panels - axes.shape[1]) : panels]:
        axis.set_xlabel("training step")
        axis.tick_params(labelbottom=True)


def scale_steps(axis: Axes, conditions: Sequence[Condition], x_scale: str) -> None:
    """The axis of training steps: "linear", or "log" (linear up to the first evaluation after step 0)."""
    runs = runs_of(conditions)
    if x_scale == "log":
        first = min((record["step"] for run in runs for record in run.evaluations if record["step"] > 0), default=1)
        axis.set_xscale("symlog", linthresh=first)
        axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.set_xlim(0, max(1, *(run.final_step for run in runs)))
