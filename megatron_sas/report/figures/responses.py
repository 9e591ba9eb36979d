"""Final results against λ and against the length of the suppression."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_sas.evaluation.base import Metric
from megatron_sas.report.figures.style import GREY, PALETTE, STYLE, draw_legend, new_figure, plain
from megatron_sas.report.responses import ResponsePoint, StageResponse
from megatron_sas.report.statistics import Estimate
from megatron_sas.report.trajectories import METRICS

LEVELS = (("#000000", "--"), (PALETTE[1], ":"), (PALETTE[2], "-."), (PALETTE[3], (0, (1, 3))))  # colours and dashes


def draw_weight_response(points: Sequence[ResponsePoint], controls: Sequence[ResponsePoint]) -> Figure | None:
    """Final loss, UAS and BLiMP of conditions with constant λ, over λ; None for fewer than two λ."""
    weights = {point.x for point in points}
    metrics = _measured([*points, *controls])
    if len(weights) < 2 or not metrics:
        return None
    with mpl.rc_context(STYLE):
        figure = new_figure(9.5, 3.1)
        axes = figure.subplots(1, len(metrics), squeeze=False)[0]
        smallest = min(abs(weight) for weight in weights if weight)
        for axis, metric in zip(axes, metrics, strict=True):
            _draw_points(axis, points, metric, PALETTE[0], "o-", "final")
            _draw_points(axis, controls, metric, PALETTE[1], "s", "control, final")
            areas = [(p.x, p.area[metric.name]) for p in points if metric.name in p.area]
            _draw_errors(axis, areas, PALETTE[2], "^:", "mean over training")
            axis.axvline(0, color=GREY, linewidth=0.9, linestyle=":")
            axis.set_xscale("symlog", linthresh=smallest)
            axis.set_xticks(sorted(weights), [f"{weight:g}".replace("-", "−") for weight in sorted(weights)])
            axis.tick_params(axis="x", labelrotation=45 if len(weights) > 4 else 0)
            axis.minorticks_off()
            axis.margins(x=0.08)
            axis.set_xlabel("λ")
            axis.set_title(metric.title, fontsize=10)
        draw_legend(figure, axes[0].get_legend_handles_labels()[0])
    return figure


def draw_stage_response(response: StageResponse) -> Figure | None:
    """Final loss, UAS and BLiMP over the step of release, with the base and what is never released as lines."""
    metrics = _measured(response.points)
    if not metrics:
        return None
    with mpl.rc_context(STYLE):
        figure = new_figure(9.5, 3.1)
        axes = figure.subplots(1, len(metrics), squeeze=False)[0]
        for axis, metric in zip(axes, metrics, strict=True):
            _draw_points(axis, response.points, metric, PALETTE[0], "o-", f"λ = {response.weight:g} until the step")
            for (label, final), (colour, dash) in zip(response.levels.items(), LEVELS, strict=False):
                if metric.name in final:
                    _draw_level(axis, label, final[metric.name], colour, dash)
            axis.set_xlabel("step of release")
            axis.set_title(metric.title, fontsize=10)
            axis.set_xlim(left=0)
        draw_legend(figure, axes[0].get_legend_handles_labels()[0])
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


def _draw_level(axis: Axes, label: str, value: Estimate, colour: str, dash: str) -> None:
    """A final value as a horizontal line, its standard error as a band."""
    axis.axhline(value.mean, color=colour, linestyle=dash, linewidth=1.4, label=plain(label))
    if value.error:
        axis.axhspan(value.mean - value.error, value.mean + value.error, color=colour, alpha=0.1, linewidth=0)
