"""Tables, JSON and the self-contained HTML page of an analysis."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, StrictUndefined

from megatron_sas import __version__
from megatron_sas.analysis.figures import draw, label_styles, save
from megatron_sas.analysis.findings import (
    Condition,
    Estimate,
    Onsets,
    caveats,
    find_onsets,
    narrate,
    summarize,
)
from megatron_sas.analysis.template import TEMPLATE
from megatron_sas.analysis.trajectories import METRICS, Run
from megatron_sas.files import write_json_atomic, write_text_atomic

NOT_MEASURED = "–"


def write_analysis(runs: Sequence[Run], directory: Path, delta: float, x_scale: str) -> list[str]:
    """Write figure.png, figure.svg, onsets.json, table.csv, table.md and report.html into `directory`.

    Returns the sentences of the report, for the terminal.
    """
    onsets = find_onsets(runs, delta)
    found = summarize(runs)
    figure = draw(runs, onsets, x_scale)
    save(figure, directory / "figure.png")
    save(figure, directory / "figure.svg")
    write_json_atomic(directory / "onsets.json", onsets_json(runs, onsets, delta))
    write_text_atomic(directory / "table.csv", table_csv(found))
    write_text_atomic(directory / "table.md", table_markdown(found))
    picture = base64.b64encode((directory / "figure.svg").read_bytes()).decode("ascii")
    write_text_atomic(directory / "report.html", report_html(runs, found, onsets, delta, picture))
    return [finding.text for finding in narrate(found, onsets)] + caveats(found)


def onsets_json(runs: Sequence[Run], onsets: Onsets, delta: float) -> dict[str, Any]:
    """Onsets of every run and metric; null where there is none, with the reason."""
    entries = []
    for run in runs:
        entry: dict[str, Any] = {"run": str(run.path), "label": run.label, "lambda": run.describe_schedule()}
        for name, onset in onsets[str(run.path)].items():
            entry[name] = {
                "break": vars(onset.bend),
                "change_point": vars(onset.change),
            }
        entries.append(entry)
    return {"megatron_sas": __version__, "delta_steps": delta, "runs": entries}


def table_csv(found: Sequence[Condition]) -> str:
    """One row per condition, full precision; empty where a value is missing."""
    columns = ["condition", "lambda", "runs", "last_step"]
    for metric in METRICS:
        columns += [metric.name, f"{metric.name}_se", f"{metric.name}_difference", f"{metric.name}_difference_se"]
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    for condition in found:
        row: dict[str, Any] = {
            "condition": condition.label,
            "lambda": condition.runs[0].describe_schedule(),
            "runs": len(condition.runs),
            "last_step": max(run.final_step for run in condition.runs),
        }
        for metric in METRICS:
            for suffix, values in (("", condition.final), ("_difference", condition.difference)):
                if metric.name in values:
                    row[f"{metric.name}{suffix}"] = values[metric.name].mean
                    row[f"{metric.name}{suffix}_se"] = values[metric.name].error
        writer.writerow(row)
    return out.getvalue()


def table_markdown(found: Sequence[Condition]) -> str:
    """The same table to read: mean ± standard error."""
    lines = [
        "| Condition | λ | Runs | Steps | " + " | ".join(metric.title for metric in METRICS) + " |",
        "|---|---|--:|--:|" + "--:|" * len(METRICS),
    ]
    for condition in found:
        cells = [
            condition.label.replace("|", "\\|"),
            condition.runs[0].describe_schedule(),
            str(len(condition.runs)),
            str(max(run.final_step for run in condition.runs)),
            *(show(condition.final.get(metric.name)) for metric in METRICS),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def show(value: Estimate | None, signed: bool = False) -> str:
    """An estimate to three decimals with its standard error where there is one."""
    if value is None:
        return NOT_MEASURED
    text = f"{value.mean:+.3f}" if signed else f"{value.mean:.3f}"
    return (text if value.error is None else f"{text} ± {value.error:.3f}").replace("-", "−")


def relation_rows(found: Sequence[Condition]) -> list[dict[str, Any]]:
    """Accuracy of the best head per relation: baseline, then untrained and final of each condition, mean over its runs.

    Relations that the evaluation left out of its table (too few edges) are left out here too.
    """
    facts: dict[str, dict[str, Any]] = {}
    for run in (run for condition in found for run in condition.runs):
        for relation, values in run.nested("uas_relations").items():
            if values.get("in_table", True):
                facts.setdefault(relation, values)
    rows = []
    for relation, values in sorted(facts.items(), key=lambda item: -item[1].get("count", 0)):
        cells = []
        for condition in found:
            pair = [
                _mean(
                    [
                        run.nested("uas_relations", first=first).get(relation, {}).get("accuracy")
                        for run in condition.runs
                    ]
                )
                for first in (True, False)
            ]
            cells.append({"untrained": pair[0], "final": pair[1]})
        offset = values.get("baseline_offset")
        rows.append(
            {
                "relation": relation,
                "count": values.get("count"),
                "baseline": values.get("baseline"),
                "offset": None if offset is None else f"{offset:+d}".replace("-", "−"),
                "cells": cells,
            }
        )
    return rows


def breakdown_rows(found: Sequence[Condition], key: str) -> list[dict[str, Any]]:
    """Final BLiMP by field, term or set, each condition's mean over its runs, with the untrained value beside it."""
    names = sorted({name for condition in found for run in condition.runs for name in run.nested(key)})
    return [
        {
            "name": name.replace("_", " "),
            "cells": [
                {
                    "untrained": _mean([_accuracy(run.nested(key, first=True).get(name)) for run in condition.runs]),
                    "final": _mean([_accuracy(run.nested(key).get(name)) for run in condition.runs]),
                }
                for condition in found
            ],
        }
        for name in names
    ]


def run_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What each run was: model, data, length, λ, seed, devices, and the whole configuration."""
    rows = []
    for run in runs:
        start = {name: value for event in reversed(run.events) for name, value in event.items()}
        tokens, seconds = (run.curve(name, "train").values[-1:] for name in ("tokens", "seconds"))
        facts = {
            "Condition": run.label,
            "Run": run.name,
            "Model": _model(run),
            "Parameters": f"{start['parameters'] / 1e6:.1f}M" if "parameters" in start else None,
            "Steps": _of(run.final_step, run.setting("train.steps")),
            "Batch size": run.setting("train.global_batch_size"),
            "Tokens": f"{tokens[0] / 1e6:.1f}M" if len(tokens) else None,
            "Time": f"{seconds[0] / 60:.1f} min" if len(seconds) else None,
            "λ": run.describe_schedule(),
            "Seed": run.setting("run.seed"),
            "Devices": _devices(start),
        }
        text = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
        rows.append({"facts": facts, "name": run.name, "config": text})
    return rows


def onset_rows(runs: Sequence[Run], onsets: Onsets) -> list[dict[str, Any]]:
    """Both estimates of each run's onsets as text."""
    rows = []
    for run in runs:
        cells = []
        for metric in METRICS:
            onset = onsets[str(run.path)].get(metric.name)
            if onset is None:
                cells.append({"step": NOT_MEASURED, "notes": ["not evaluated"], "is_clear": False})
                continue
            bend, change = onset.bend, onset.change
            notes = [bend.reason or f"bend {bend.strength:.3f}" + ("" if bend.clear else ", within noise")]
            notes.append(f"{change.low:g} to {change.high:g}" if onset.interval else f"no interval: {change.reason}")
            step = NOT_MEASURED if bend.step is None else f"{bend.step:.0f}"
            cells.append({"step": step, "notes": notes, "is_clear": bend.clear})
        rows.append({"label": run.label, "name": run.name, "cells": cells})
    return rows


def report_html(
    runs: Sequence[Run], found: Sequence[Condition], onsets: Onsets, delta: float, figure_svg_base64: str
) -> str:
    """The page: no scripts, nothing loaded from elsewhere."""
    measured = [metric for metric in METRICS if any(metric.name in condition.final for condition in found)]
    colours = {label: colour for label, (colour, _) in label_styles(runs).items()}
    ordered = [run for condition in found for run in condition.runs]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"show": show, "decimals": _decimals, "percent": _percent}
    return environment.from_string(TEMPLATE).render(
        version=__version__,
        found=found,
        metrics=METRICS,
        measured=measured,
        colours=colours,
        findings=narrate(found, onsets),
        last_step=max(run.final_step for run in runs),
        caveats=caveats(found),
        figure=figure_svg_base64,
        delta=delta,
        onset_rows=onset_rows(ordered, onsets),
        relation_rows=relation_rows(found),
        field_rows=breakdown_rows(found, "blimp_fields"),
        set_rows=breakdown_rows(found, "blimp_sets"),
        run_rows=run_rows(ordered),
        uas_baseline=_mean([run.uas_baseline for run in runs]),
    )


def _model(run: Run) -> str:
    """The named size, and what the configuration puts in place of its own dimensions."""
    names = {"num_layers": "layers", "hidden_size": "wide", "num_heads": "heads"}
    changes = [f"{value} {word}" for name, word in names.items() if (value := run.setting(f"model.{name}"))]
    size = run.setting("model.size") or "base"
    return f"{size} ({', '.join(changes)})" if changes else size


def _devices(start: dict[str, Any]) -> str | None:
    """Processes and device, as the trainer's first event names them."""
    if "world_size" not in start:
        return start.get("device")
    return f"{start['world_size']} × {start.get('device', 'process')}"


def _of(done: int, planned: int | None) -> str:
    return f"{done}" if planned in (None, done) else f"{done} of {planned}"


def _accuracy(value: Any) -> float | None:
    return value.get("accuracy") if isinstance(value, dict) else value


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _decimals(value: float | None, digits: int = 2) -> str:
    return NOT_MEASURED if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    """Width of a bar in CSS."""
    return f"{100 * min(max(value or 0, 0), 1):.1f}%"
