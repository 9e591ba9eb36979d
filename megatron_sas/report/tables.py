"""Tables of an analysis: CSV and Markdown files, JSON, and the rows of the report's tables."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import yaml

from megatron_sas import __version__
from megatron_sas.evaluation.minimal_pairs import BLIMP
from megatron_sas.evaluation.uas import RELATIONS, UAS
from megatron_sas.onsets.offline import Onset
from megatron_sas.report.analyse import Analysis
from megatron_sas.report.comparisons import Condition
from megatron_sas.report.run_onsets import Onsets, Order, RunOnset
from megatron_sas.report.statistics import Estimate
from megatron_sas.report.trajectories import METRICS, TABLE_METRICS, Run
from megatron_sas.run.directory import describe_seeds

NOT_MEASURED = "–"


def onsets_json(analysis: Analysis) -> dict[str, Any]:
    """Onsets of every run and metric; null where there is none, with the reason."""
    entries = []
    for run in analysis.runs:
        entry: dict[str, Any] = {"run": str(run.path), "label": run.label, "lambda": run.describe_schedule()}
        entry["seed"] = run.seed
        for name, onset in analysis.onsets[str(run.path)].items():
            entry[name] = {"break": _break_json(onset.strongest), "change_point": vars(onset.change)}
            if onset.items:
                entry[name]["bootstrap_over_items"] = {"low": onset.items.low, "high": onset.items.high}
        entries.append(entry)
    orders = {label: _order_json(order) for label, order in analysis.orders.items() if order is not None}
    return {
        "megatron_sas": __version__,
        "delta_steps": analysis.delta,
        "replicates": analysis.replicates if analysis.with_items else 0,
        "runs": entries,
        "structure_before_capabilities": orders,
    }


def claims_json(analysis: Analysis) -> list[dict[str, Any]]:
    """Claims with their parts, rules, evidence and verdicts."""
    return [
        {
            "claim": claim.number,
            "statement": claim.statement,
            "verdict": claim.verdict,
            "missing": claim.missing,
            "parts": [vars(part) | {"evidence": list(part.evidence)} for part in claim.parts],
        }
        for claim in analysis.claims
    ]


def table_csv(conditions: Sequence[Condition]) -> str:
    """One row per condition, full precision; empty where a value is missing."""
    columns = ["condition", "role", "lambda", "runs", "last_step"]
    for metric in TABLE_METRICS:
        columns += [
            f"{metric.name}{end}" for end in ("", "_se", "_runs", "_difference", "_difference_se", "_p", "_holm")
        ]
    rows = []
    for condition in conditions:
        row: dict[str, Any] = {
            "condition": condition.label,
            "role": condition.role,
            "lambda": condition.runs[0].describe_schedule(),
            "runs": len(condition.runs),
            "last_step": max(run.final_step for run in condition.runs),
        }
        for metric in TABLE_METRICS:
            if final := condition.final.get(metric.name):
                values = {"": final.mean, "_se": final.error, "_runs": final.count}
                row |= {f"{metric.name}{end}": value for end, value in values.items()}
            if comparison := condition.difference.get(metric.name):
                value = comparison.value
                values = {"": value.mean, "_se": value.error}
                row |= {f"{metric.name}_difference{end}": number for end, number in values.items()}
                row |= {f"{metric.name}_p": value.p, f"{metric.name}_holm": comparison.holm}
        rows.append(row)
    return _csv(columns, rows)


def differences_csv(analysis: Analysis) -> str:
    """Every comparison of the report's tables: to the base, and to controls, each group a Holm family."""
    to_base = [c for condition in analysis.conditions for c in condition.difference.values()]
    rows = [
        {
            "family": family,
            "condition": c.left,
            "compared_with": c.right,
            "metric": c.metric.name,
            "difference": c.value.mean,
            "standard_error": c.value.error,
            "degrees_of_freedom": c.value.freedom,
            "p": c.value.p,
            "p_holm": c.holm,
            "test": "paired t" if c.value.paired else "Welch t",
            "runs": c.value.counts[0],
            "runs_compared_with": c.value.counts[1],
        }
        for family, comparisons in (("base", to_base), ("control", analysis.to_controls))
        for c in comparisons
    ]
    columns = ["family", "condition", "compared_with", "metric", "difference", "standard_error", "degrees_of_freedom"]
    return _csv([*columns, "p", "p_holm", "test", "runs", "runs_compared_with"], rows)


def table_markdown(conditions: Sequence[Condition]) -> str:
    """The paper's table to read: mean ± standard error over seeds."""
    lines = [
        "| Condition | λ | Runs | Steps | " + " | ".join(metric.title for metric in TABLE_METRICS) + " |",
        "|---|---|--:|--:|" + "--:|" * len(TABLE_METRICS),
    ]
    for condition in conditions:
        cells = [
            condition.label.replace("|", "\\|"),
            condition.runs[0].describe_schedule(),
            str(len(condition.runs)),
            str(max(run.final_step for run in condition.runs)),
            *(show(condition.final.get(metric.name)) for metric in TABLE_METRICS),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def show(value: Estimate | None, signed: bool = False) -> str:
    """An estimate to three decimals with its standard error where there is one."""
    if value is None:
        return NOT_MEASURED
    text = f"{value.mean:+.3f}" if signed else f"{value.mean:.3f}"
    return (text if value.error is None else f"{text} ± {value.error:.3f}").replace("-", "−")


def relation_rows(conditions: Sequence[Condition]) -> list[dict[str, Any]]:
    """Accuracy of the best head per relation: baseline, then untrained and final of each condition, mean over its runs.

    Relations that the evaluation left out of its table (too few edges) are left out here too.
    """
    facts: dict[str, dict[str, Any]] = {}
    for run in (run for condition in conditions for run in condition.runs):
        for relation, values in run.nested(RELATIONS.key).items():
            if values.get("in_table", True):
                facts.setdefault(relation, values)
    rows = []
    for relation, values in sorted(facts.items(), key=lambda item: -item[1].get("count", 0)):
        cells = []
        for condition in conditions:
            pair = [
                mean(
                    [
                        run.nested(RELATIONS.key, first=first).get(relation, {}).get("accuracy")
                        for run in condition.ending[UAS.name]
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


def breakdown_rows(conditions: Sequence[Condition], key: str) -> list[dict[str, Any]]:
    """Final BLiMP by field, term or set, each condition's mean over its runs, with the untrained value beside it."""
    names = sorted({name for condition in conditions for run in condition.runs for name in run.nested(key)})
    return [
        {
            "name": name.replace("_", " "),
            "cells": [
                {
                    "untrained": mean([_accuracy(run.nested(key, first=True).get(name)) for run in runs]),
                    "final": mean([_accuracy(run.nested(key).get(name)) for run in runs]),
                }
                for runs in (condition.ending[BLIMP.name] for condition in conditions)
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
            "Seed": describe_seeds(run.config),
            "Devices": _devices(start),
        }
        text = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
        rows.append({"facts": facts, "name": run.name, "config": text})
    return rows


def onset_rows(runs: Sequence[Run], onsets: Onsets) -> list[dict[str, Any]]:
    """Every run's onsets as text, with both kinds of intervals."""
    return [
        {
            "label": run.label,
            "name": run.name,
            "cells": [_onset_cell(onsets[str(run.path)].get(metric.name)) for metric in METRICS],
        }
        for run in runs
    ]


def order_rows(analysis: Analysis) -> list[dict[str, Any]]:
    """Structure against capabilities, per condition in which some run shows both."""
    rows = []
    for label, order in analysis.orders.items():
        if order is None:
            continue
        shares = [share for run in order.runs if (share := run.share(1)) is not None]
        rows.append(
            {
                "label": label,
                "runs": f"{len(order.runs)} of {order.num_runs}",
                "lag": _steps(order.lag.mean) + ("" if order.lag.error is None else f" ± {order.lag.error:.0f}"),
                "seeds": _interval(order.lag.interval(0.95)),
                "items": _interval(order.items),
                "signs": f"{order.first} / {order.last}",
                "sign_p": NOT_MEASURED if order.sign_p is None else f"{order.sign_p:.2f}",
                "shares": ", ".join(f"{share:.0%}" for share in shares) or NOT_MEASURED,
                "verdict": ("first" if order.lag.mean > 0 else "last") if order.established else "not established",
            }
        )
    return rows


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


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of the values that are there; None when none is."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _onset_cell(onset: RunOnset | None) -> dict[str, Any]:
    if onset is None:
        return {"step": NOT_MEASURED, "notes": ["not evaluated"], "is_detected": False}
    strongest, change = onset.strongest, onset.change
    doubt = "" if strongest.detected else f", {strongest.reason or 'within noise'}"
    notes = [strongest.reason if strongest.step is None else f"bend {strongest.strength:.3f}{doubt}"]
    if onset.items and onset.items.low is not None:
        notes.append(f"items: {onset.items.low:.0f} to {onset.items.high:.0f}")
    fit = onset.change_interval
    notes.append(f"change point: {fit[0]:g} to {fit[1]:g}" if fit else f"no change point: {change.reason}")
    step = NOT_MEASURED if strongest.step is None else f"{strongest.step:.0f}"
    return {"step": step, "notes": notes, "is_detected": strongest.detected}


def _break_json(onset: Onset) -> dict[str, Any]:
    """Its fields, under the names that the file has."""
    return {"clear" if name == "detected" else name: value for name, value in vars(onset).items()}


def _order_json(order: Order) -> dict[str, Any]:
    return {
        "runs_with_both": len(order.runs),
        "runs": order.num_runs,
        "mean_lag_steps": order.lag.mean,
        "standard_error": order.lag.error,
        "interval_over_seeds": order.lag.interval(0.95),
        "interval_over_items": order.items,
        "structure_first": order.first,
        "structure_last": order.last,
        "sign_test_p": order.sign_p,
        "share_of_replicates_structure_first": [run.share(1) for run in order.runs],
        "share_of_replicates_at_one_step": [run.share(0) for run in order.runs],
        "established": order.established,
    }


def _interval(interval: tuple[float, float] | None) -> str:
    return NOT_MEASURED if interval is None else f"{_steps(interval[0])} to {_steps(interval[1])}"


def _steps(value: float) -> str:
    return f"{value:+.0f}".replace("-", "−")


def _csv(columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
