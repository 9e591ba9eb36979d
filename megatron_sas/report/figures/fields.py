"""BLiMP by field: over steps, and at the end with errors over seeds."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from megatron_sas.evaluation.minimal_pairs import BLIMP, FIELDS, TERMS
from megatron_sas.report.comparisons import Condition, runs_of
from megatron_sas.report.figures.style import (
    GREY,
    STYLE,
    condition_lines,
    draw_curves,
    draw_legend,
    finish_grid,
    label_styles,
    marker_of,
    new_figure,
    plain,
    scale_steps,
)
from megatron_sas.report.statistics import estimate
from megatron_sas.report.trajectories import Curve, Run

MAX_FIELDS = 12


def draw_fields_over_steps(conditions: Sequence[Condition], x_scale: str = "linear") -> Figure | None:
    """A panel per field, a curve per condition."""
    runs = runs_of(conditions)
    names, styles = field_names(runs), label_styles(runs)
    if not names or not any(len(field_curve(run, names[0])) > 1 for run in runs):
        return None
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    with mpl.rc_context(STYLE):
        figure = new_figure(9.5, 2.3 * rows + 0.6)
        axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axis, name in zip(axes.flat, names, strict=False):
            for condition in conditions:
                curves = [curve for run in condition.runs if len(curve := field_curve(run, name))]
                if curves:
                    draw_curves(axis, curves, *styles[condition.label])
            axis.axhline(BLIMP.chance, color=GREY, linewidth=0.9, linestyle=":")
            axis.set_title(plain(name.replace("_", " ")), fontsize=10)
        scale_steps(axes[0, 0], runs, x_scale)
        finish_grid(axes, len(names))
        for axis in axes[:, 0]:
            axis.set_ylabel("accuracy")
        draw_legend(figure, condition_lines(styles))
    return figure


def draw_final_fields(conditions: Sequence[Condition]) -> Figure | None:
    """Final accuracy per field and condition, mean and standard error over runs, single runs as small dots."""
    runs = runs_of(conditions)
    names, styles = field_names(runs), label_styles(runs)
    if not names:
        return None
    with mpl.rc_context(STYLE):
        figure = new_figure(max(5.0, min(9.5, 1.5 + len(names) * (0.6 + 0.16 * len(conditions)))), 3.6)
        axis = figure.subplots()
        for rank, condition in enumerate(conditions):
            colour, dash = styles[condition.label]
            shift = 0.7 * ((rank + 0.5) / len(conditions) - 0.5)
            for place, name in enumerate(names):
                curves = [field_curve(run, name) for run in condition.ending[BLIMP.name]]
                finals = [curve.values[-1] for curve in curves if len(curve)]
                if not finals:
                    continue
                value = estimate(finals)
                x = place + shift
                axis.plot([x] * len(finals), finals, ".", color=colour, alpha=0.35, markersize=4, zorder=2)
                marker = marker_of(dash)
                axis.errorbar(x, value.mean, value.error, fmt=marker, color=colour, markersize=5.5, capsize=2, zorder=3)
        axis.axhline(BLIMP.chance, color=GREY, linewidth=0.9, linestyle=":")
        axis.set_xticks(np.arange(len(names)), [plain(name.replace("_", "\n")) for name in names])
        axis.grid(visible=False, axis="x")
        axis.set_ylabel("accuracy at the end")
        handles = [
            Line2D([], [], color=colour, linestyle="", marker=marker_of(dash), label=plain(label))
            for label, (colour, dash) in styles.items()
        ]
        draw_legend(figure, handles)
    return figure


def field_names(runs: Sequence[Run]) -> list[str]:
    """BLiMP's fields; where everything is of one field (or none is recorded), its terms."""
    for key in (FIELDS.key, TERMS.key):
        names = sorted({name for run in runs for name in run.nested(key)})
        if len(names) > 1:
            return names[:MAX_FIELDS]
    return sorted({name for run in runs for name in run.nested(FIELDS.key)})[:MAX_FIELDS]


def field_curve(run: Run, name: str) -> Curve:
    """Accuracy of a field or term over steps."""
    points = []
    for record in run.evaluations:
        value = (record.get(FIELDS.key) or {}).get(name, (record.get(TERMS.key) or {}).get(name))
        points += [(record["step"], value)] if value is not None else []
    return Curve(*np.array(points, np.float64).reshape(-1, 2).T)
