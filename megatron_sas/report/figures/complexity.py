"""Complexity through the phases: intrinsic dimension, weight norm, attention entropy, attention to heads."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from megatron_sas.evaluation.minimal_pairs import BLIMP
from megatron_sas.evaluation.registry import snapshot_metrics
from megatron_sas.evaluation.uas import UAS
from megatron_sas.report.comparisons import Condition, runs_of
from megatron_sas.report.figures.style import (
    GREY,
    STYLE,
    condition_lines,
    draw_curves,
    draw_legend,
    label_styles,
    new_figure,
    scale_steps,
)
from megatron_sas.report.run_onsets import Onsets, detected_onset


def draw_complexity(conditions: Sequence[Condition], onsets: Onsets, x_scale: str = "linear") -> Figure | None:
    """A panel per measure that any run has; grey lines are the base's mean onsets of structure and capabilities."""
    runs = runs_of(conditions)
    panels = [m for m in snapshot_metrics() if m.axis and any(len(run.curve(m.key)) > 1 for run in runs)]
    if not panels:
        return None
    styles = label_styles(runs)
    marks = []
    for metric, dash, name in ((UAS, "--", "structure onset (base)"), (BLIMP, ":", "capabilities onset (base)")):
        steps = [
            onset.step for run in runs if run.is_base and (onset := detected_onset(onsets, run, metric)) is not None
        ]
        marks += [(float(np.mean(steps)), dash, name)] if steps else []
    with mpl.rc_context(STYLE):
        figure = new_figure(9.5, 1.7 * len(panels) + 1.0)
        axes = np.atleast_1d(figure.subplots(len(panels), 1, sharex=True))
        for axis, metric in zip(axes, panels, strict=True):
            for condition in conditions:
                curves = [curve for run in condition.runs if len(curve := run.curve(metric.key)) > 1]
                if curves:
                    draw_curves(axis, curves, *styles[condition.label])
            for step, dash, _ in marks:
                axis.axvline(step, color=GREY, linestyle=dash, linewidth=1.2, zorder=2)
            axis.set_ylabel(metric.axis)
        scale_steps(axes[-1], runs, x_scale)
        axes[-1].set_xlabel("training step")
        figure.align_ylabels(axes)
        handles = condition_lines(styles)
        handles += [Line2D([], [], color=GREY, linestyle=dash, linewidth=1.2, label=name) for _, dash, name in marks]
        draw_legend(figure, handles)
    return figure
