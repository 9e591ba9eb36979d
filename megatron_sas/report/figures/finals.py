"""Final results: BLiMP by field, and everything against λ and against the length of the suppression."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from megatron_sas.evaluation.base import Metric
from megatron_sas.evaluation.minimal_pairs import BLIMP
from megatron_sas.report.comparisons import Condition, runs_of
from megatron_sas.report.figures import style
from megatron_sas.report.figures.trajectories import field_curve, field_names
from megatron_sas.report.responses import ResponsePoint, StageResponse
from megatron_sas.report.statistics import Estimate, estimate, true_minus
from megatron_sas.report.trajectories import METRICS

LEVELS = (
    ("#000000", "--"),
    (style.PALETTE[1], ":"),
    (style.PALETTE[2], "-."),
    (style.PALETTE[3], (0, (1, 3))),
)  # colours and dashes


@style.applied
def draw_final_fields(conditions: Sequence[Condition]) -> Figure | None:
    """Final accuracy per field and condition, mean and standard error over runs, single runs as small dots."""
    names = field_names(runs_of(conditions))
    if not names:
        return None
    figure = style.new_figure(max(5.0, min(9.5, 1.5 + len(names) * (0.6 + 0.16 * len(conditions)))), 3.6)
    axis = figure.subplots()
    handles = []
    for rank, (condition, colour, dash) in enumerate(style.styled(conditions)):
        marker, shift = style.marker_of(dash), 0.7 * ((rank + 0.5) / len(conditions) - 0.5)
        handles.append(Line2D([], [], color=colour, linestyle="", marker=marker, label=style.plain(condition.label)))
        for place, name in enumerate(names):
            curves = [field_curve(run, name) for run in condition.ending[BLIMP.name]]
            finals = [curve.values[-1] for curve in curves if len(curve)]
            if not finals:
                continue
            value, x = estimate(finals), place + shift
            axis.plot([x] * len(finals), finals, ".", color=colour, alpha=0.35, markersize=4, zorder=2)
            axis.errorbar(x, value.mean, value.error, fmt=marker, color=colour, markersize=5.5, capsize=2, zorder=3)
    axis.axhline(BLIMP.chance, color=style.GREY, linewidth=0.9, linestyle=":")
    axis.set_xticks(np.arange(len(names)), [style.plain(name.replace("_", "\n")) for name in names])
    axis.grid(visible=False, axis="x")
    axis.set_ylabel("accuracy at the end")
    style.draw_legend(figure, handles)
    return figure


@style.applied
def draw_weight_response(points: Sequence[ResponsePoint], controls: Sequence[ResponsePoint]) -> Figure | None:
    """Final loss, UAS and BLiMP of conditions with constant λ, over λ; None for fewer than two λ."""
    weights = sorted({point.x for point in points})
    metrics = _measured([*points, *controls])
    if len(weights) < 2 or not metrics:
        return None
    figure = style.new_figure(9.5, 3.1)
    axes = figure.subplots(1, len(metrics), squeeze=False)[0]
    smallest = min(abs(weight) for weight in weights if weight)
    for axis, metric in zip(axes, metrics, strict=True):
        _draw_points(axis, points, metric, style.PALETTE[0], "o-", "final")
        _draw_points(axis, controls, metric, style.PALETTE[1], "s", "control, final")
        areas = [(p.x, p.area[metric.name]) for p in points if metric.name in p.area]
        _draw_errors(axis, areas, style.PALETTE[2], "^:", "mean over training")
        axis.axvline(0, color=style.GREY, linewidth=0.9, linestyle=":")
        axis.set_xscale("symlog", linthresh=smallest)
        axis.set_xticks(weights, [true_minus(f"{weight:g}") for weight in weights])
        axis.tick_params(axis="x", labelrotation=45 if len(weights) > 4 else 0)
        axis.minorticks_off()
        axis.margins(x=0.08)
        axis.set_xlabel("λ")
        axis.set_title(metric.title, fontsize=10)
    style.draw_legend(figure, axes[0].get_legend_handles_labels()[0])
    return figure


@style.applied
def draw_stage_response(response: StageResponse) -> Figure | None:
    """Final loss, UAS and BLiMP over the step of release, with the base and what is never released as lines."""
    metrics = _measured(response.points)
    if not metrics:
        return None
    figure = style.new_figure(9.5, 3.1)
    axes = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axis, metric in zip(axes, metrics, strict=True):
        _draw_points(axis, response.points, metric, style.PALETTE[0], "o-", f"λ = {response.weight:g} until the step")
        for (label, final), (colour, dash) in zip(response.levels.items(), LEVELS, strict=False):
            if value := final.get(metric.name):
                axis.axhline(value.mean, color=colour, linestyle=dash, linewidth=1.4, label=style.plain(label))
                if error := value.error:
                    axis.axhspan(value.mean - error, value.mean + error, color=colour, alpha=0.1, linewidth=0)
        axis.set_xlabel("step of release")
        axis.set_title(metric.title, fontsize=10)
        axis.set_xlim(left=0)
    style.draw_legend(figure, axes[0].get_legend_handles_labels()[0])
    return figure


def _measured(points: Sequence[ResponsePoint]) -> list[Metric]:
    return [metric for metric in METRICS if any(metric.name in point.final for point in points)]


def _draw_points(
    axis: Axes, points: Sequence[ResponsePoint], metric: Metric, colour: str, form: str, label: str
) -> None:
    known = [point for point in points if metric.name in point.final]
    for point in known:
        values = point.values[metric.name]
        axis.plot([point.x] * len(values), values, ".", color=colour, alpha=0.35, markersize=5)
    _draw_errors(axis, [(point.x, point.final[metric.name]) for point in known], colour, form, label)


def _draw_errors(axis: Axes, points: Sequence[tuple[float, Estimate]], colour: str, form: str, label: str) -> None:
    if points:
        x, values = [x for x, _ in points], [value for _, value in points]
        errors = [value.error or 0 for value in values]
        means = [value.mean for value in values]
        axis.errorbar(x, means, errors, fmt=form, color=colour, capsize=3, markersize=5, linewidth=1.6, label=label)
