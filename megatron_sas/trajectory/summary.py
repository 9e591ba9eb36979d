"""A trajectory's points taken together: which head serves which relation and since when, and a table of the numbers."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sas.core.files import write_json_atomic, write_text_atomic
from megatron_sas.trajectory.points import read_points

HEADS = "heads.json"
SUMMARY = "summary.csv"
HEADS_FORMAT = "megatron_sas heads over time"

# Column of summary.csv: where in point.json it is.
COLUMNS = {
    "uas": ("uas", "uas"),
    "uas_baseline": ("uas", "uas_baseline"),
    "uas_single_head": ("uas", "uas_single_head"),
    "blimp": ("blimp", "blimp"),
    "blimp_ties": ("blimp", "num_ties"),
    "mlm_loss": ("mlm_loss",),
    "twonn": ("intrinsic_dimension", "twonn"),
    "twonn_standard_error": ("intrinsic_dimension", "standard_error"),
    "weight_norm": ("weight_norm",),
    "attention_entropy": ("attention_entropy", "mean"),
    "attention_to_cls": ("attention_to_cls", "mean"),
    "attention_to_sep": ("attention_to_sep", "mean"),
    "sas_to_head": ("sas", "to_head"),
    "sas_to_dependent": ("sas", "to_dependent"),
    "sas_uniform_to_head": ("sas", "uniform_to_head"),
    "sas_uniform_to_dependent": ("sas", "uniform_to_dependent"),
    "text_sas_to_head": ("text_sas", "to_head"),
    "text_sas_to_dependent": ("text_sas", "to_dependent"),
}


def write_summary(directory: str | Path) -> None:
    """Write heads.json (if UAS was measured) and summary.csv from all points of a trajectory."""
    directory = Path(directory)
    points = read_points(directory)
    if points and all("uas" in point for point in points):
        write_json_atomic(directory / HEADS, heads_over_time(points))
    write_text_atomic(directory / SUMMARY, summary_table(points))


def heads_over_time(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Which head serves which relation in the end, and since when.

    `points` have `step` and `uas` (as `evaluate_uas` returns it), by rising step, of one treebank and model shape.

    Returns `steps` and, by falling number of edges, `relations`: `count`, `baseline` and `baseline_offset` (the best
    fixed offset), `layer`, `head` and `direction` of the best head at the last point, its `accuracy` at every point,
    `since` (the first step from which it stays above the baseline up to the end; None if it is not above it there),
    and `best`: [layer, head, direction, accuracy] of the best head at every point.
    """
    steps = [point["step"] for point in points]
    last = points[-1]["uas"]
    names = last["counts"]["relations"]
    directions = last["counts"]["directions"]
    correct = np.array([point["uas"]["counts"]["correct"] for point in points])  # (points, R, 2, L, H)
    relations = {}
    for name, row in last["relations"].items():
        index = names.index(name)
        place = (directions.index(row["direction"]), row["layer"], row["head"])
        accuracy = correct[:, index][:, *place] / row["count"]
        best = [point["uas"]["relations"][name] for point in points]
        relations[name] = {
            **{key: row[key] for key in ("count", "baseline", "baseline_offset", "layer", "head", "direction")},
            "since": _since(steps, accuracy > row["baseline"]),
            "accuracy": accuracy.tolist(),
            "best": [[b["layer"], b["head"], b["direction"], b["accuracy"]] for b in best],
        }
    return {"format": HEADS_FORMAT, "version": 1, "steps": steps, "relations": relations}


def summary_table(points: Sequence[Mapping[str, Any]]) -> str:
    """CSV with a line a point: step, `COLUMNS` of what was measured, and a column for every field of BLiMP."""
    fields = sorted({field for point in points for field in point.get("blimp", {}).get("fields", {})})
    columns = {name: path for name, path in COLUMNS.items() if any(_get(point, path) is not None for point in points)}
    columns |= {f"blimp_{field}": ("blimp", "fields", field) for field in fields}
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["step", *columns])
    for point in points:
        writer.writerow([point["step"], *(_get(point, path) for path in columns.values())])
    return table.getvalue()


def _since(steps: Sequence[int], above: np.ndarray) -> int | None:
    below = np.flatnonzero(~above)
    first = 0 if not len(below) else int(below[-1]) + 1
    return steps[first] if first < len(steps) else None


def _get(value: Any, path: Sequence[str]) -> Any:
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value
