"""Heat maps: which relations heads follow, and since when."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure

from megatron_sas.evaluation.uas import RELATIONS
from megatron_sas.report.comparisons import Condition, runs_of
from megatron_sas.report.figures.style import STYLE, draw_legend, finish_grid, grid_shape, mean_curve, new_figure, plain
from megatron_sas.report.trajectories import Curve, Run

without_grid = mpl.rc_context({**STYLE, "axes.grid": False})
MAX_RELATIONS = 14
MAP = "viridis"
DIRECTIONS = ("dep→head", "head→dep")


@without_grid
def draw_relations(conditions: Sequence[Condition]) -> Figure | None:
    """Accuracy of the best head per relation over steps, a panel per condition, mean over its runs."""
    names = frequent_relations(runs_of(conditions))
    panels = [(c.label, [_mean_relation(c.runs, name) for name in names]) for c in conditions]
    panels = [(label, curves) for label, curves in panels if any(len(curve) > 1 for curve in curves)]
    if not panels:
        return None
    rows, columns = grid_shape(len(panels))
    figure = new_figure(3.6 * columns + 1.4, rows * (0.24 * len(names) + 0.8) + 0.3)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    highest = max(curve.values.max() for _, curves in panels for curve in curves if len(curve))
    for axis, (label, curves) in zip(axes.flat, panels, strict=False):
        mesh = _heat(axis, curves, highest)
        axis.set_title(plain(label), fontsize=10)
    finish_grid(axes, len(panels))
    axes[0, 0].set_yticks(np.arange(len(names)), names)
    figure.colorbar(mesh, ax=axes, label="accuracy of the best head", shrink=0.8)
    return figure


@without_grid
def draw_heads(runs: Sequence[Run]) -> Figure | None:
    """Of one run: the heads that end best, one per relation, over steps; a dot where half of the rise is done.

    The run is the first with every head measured (bases come first).
    """
    run = next((run for run in runs if len(run.measured.head_counts) > 1), None)
    if run is None:
        return None
    edges = run.measured.edge_counts
    steps = sorted(run.measured.head_counts)
    counts = np.stack([run.measured.head_counts[step] for step in steps])  # (points, R, 2, L, H)
    labels, curves = [], []
    for relation in np.argsort(-edges, kind="stable")[:MAX_RELATIONS]:
        final = counts[-1, relation]
        direction, layer, head = np.unravel_index(final.argmax(), final.shape)
        labels.append(f"{run.measured.relations[relation]}  L{layer} H{head} {DIRECTIONS[direction]}")
        accuracy = counts[:, relation, direction, layer, head] / edges[relation]
        curves.append(Curve(np.array(steps, np.float64), accuracy))
    figure = new_figure(9.5, 0.27 * len(curves) + 1.1)
    axis = figure.subplots()
    mesh = _heat(axis, curves, max(curve.values.max() for curve in curves))
    handles = []
    for rank, curve in enumerate(curves):
        half = half_way(curve)
        if half is not None:
            dot = {"color": "white", "markeredgecolor": "black", "markersize": 5, "label": "half of the rise is done"}
            handles += axis.plot(half, rank, "o", **dot)
    axis.set_yticks(np.arange(len(labels)), labels)
    axis.set_xlabel("training step")
    axis.set_title(plain(f"Heads that end best, in {run.title}"), fontsize=10)
    figure.colorbar(mesh, ax=axis, label="accuracy of this head")
    if handles:
        draw_legend(figure, handles[:1])
    return figure


def frequent_relations(runs: Sequence[Run]) -> list[str]:
    """The most frequent relations that an evaluation put into its table."""
    counts: dict[str, int] = {}
    for run in runs:
        for name, values in run.nested(RELATIONS.key).items():
            if values.get("in_table", True):
                counts[name] = max(counts.get(name, 0), values.get("count") or 0)
    return sorted(counts, key=lambda name: (-counts[name], name))[:MAX_RELATIONS]


def half_way(curve: Curve) -> float | None:
    """The first step at which half of the rise from the first to the last value is done; None without a rise."""
    target = (curve.values[0] + curve.values[-1]) / 2
    return None if curve.values[-1] <= curve.values[0] else float(curve.steps[np.argmax(curve.values >= target)])


def _mean_relation(runs: Sequence[Run], name: str) -> Curve:
    curves = []
    for run in runs:
        records = [(r["step"], (r.get(RELATIONS.key) or {}).get(name, {}).get("accuracy")) for r in run.evaluations]
        curves.append(Curve.of([(step, value) for step, value in records if value is not None]))
    curves = [curve for curve in curves if len(curve)]
    return mean_curve(curves) if curves else Curve.of([])


def _heat(axis: Axes, curves: Sequence[Curve], highest: float) -> QuadMesh:
    """One row per curve; a cell reaches half-way to the neighbouring evaluations. Rows may lack steps."""
    steps = np.unique(np.concatenate([curve.steps for curve in curves]))
    values = np.full((len(curves), len(steps)), np.nan)
    for row, curve in zip(values, curves, strict=True):
        row[np.searchsorted(steps, curve.steps)] = curve.values
    edges = np.concatenate([steps[:1], (steps[1:] + steps[:-1]) / 2, steps[-1:]])
    rows = np.arange(len(curves) + 1) - 0.5
    mesh = axis.pcolormesh(edges, rows, values, cmap=MAP, vmin=0, vmax=highest or 1, rasterized=True)
    axis.set_ylim(len(curves) - 0.5, -0.5)
    return mesh
