"""A trajectory's points taken together: which head serves which relation and since when, and a table of the numbers."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sas.core.files import write_json_atomic, write_text_atomic
from megatron_sas.evaluation.registry import snapshot_metrics
from megatron_sas.evaluation.uas import UAS
from megatron_sas.trajectory.points import read_points

HEADS = "heads.json"
SUMMARY = "summary.csv"
HEADS_FORMAT = "megatron_sas heads over time"


def write_summary(directory: str | Path) -> None:
    """Write heads.json (if UAS was measured) and summary.csv from all points of a trajectory."""
    directory = Path(directory)
    points = read_points(directory)
    if points and all(UAS.point[0] in point for point in points):
        write_json_atomic(directory / HEADS, heads_over_time(points))
    write_text_atomic(directory / SUMMARY, summary_table(points))


def heads_over_time(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Which head serves which relation in the end, and since when.

    `points` have `step` and `uas` (of `TreebankTask.evaluate`), by rising step, of one treebank and model shape.

    Returns `steps` and, by falling number of edges, `relations`: `count`, `baseline` and `baseline_offset` (the best
    fixed offset), `layer`, `head` and `direction` of the best head at the last point, its `accuracy` at every point,
    `since` (the first step from which it stays above the baseline up to the end; None if it is not above it there),
    and `best`: [layer, head, direction, accuracy] of the best head at every point.
    """
    steps, results = [point["step"] for point in points], [point[UAS.point[0]] for point in points]
    last, counts = results[-1], results[-1]["counts"]
    correct = np.array([result["counts"]["correct"] for result in results])  # (points, R, 2, L, H)
    relations = {}
    for name, row in last["relations"].items():
        place = (counts["directions"].index(row["direction"]), row["layer"], row["head"])
        accuracy = correct[:, counts["relations"].index(name)][:, *place] / row["count"]
        best = [result["relations"][name] for result in results]
        relations[name] = {
            **{key: row[key] for key in ("count", "baseline", "baseline_offset", "layer", "head", "direction")},
            "since": _since(steps, accuracy > row["baseline"]),
            "accuracy": accuracy.tolist(),
            "best": [[b["layer"], b["head"], b["direction"], b["accuracy"]] for b in best],
        }
    return {"format": HEADS_FORMAT, "version": 1, "steps": steps, "relations": relations}


def summary_table(points: Sequence[Mapping[str, Any]]) -> str:
    """CSV with a line a point: step, every number that was measured, and columns for the rows of some tables."""
    columns: dict[str, list[Any]] = {"step": [point["step"] for point in points]}
    tables: dict[str, list[Any]] = {}
    for metric in snapshot_metrics():
        values = [metric.in_point(point) for point in points]
        if metric.each:
            rows = sorted({row for value in values for row in value or {}})
            tables |= {metric.each.format(row): [(value or {}).get(row) for value in values] for row in rows}
        elif any(value is not None and not isinstance(value, Mapping) for value in values):
            columns[metric.column] = values
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow([*columns, *tables])
    writer.writerows(zip(*columns.values(), *tables.values(), strict=True))
    return table.getvalue()


def _since(steps: Sequence[int], above: np.ndarray) -> int | None:
    below = np.flatnonzero(~above)
    first = 0 if not len(below) else int(below[-1]) + 1
    return steps[first] if first < len(steps) else None
