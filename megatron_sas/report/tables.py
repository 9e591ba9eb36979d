"""Tables of an analysis: CSV and Markdown files, JSON, and the rows of the report's tables."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import yaml

from megatron_sas import __version__
from megatron_sas.evaluation.base import Metric
from megatron_sas.evaluation.minimal_pairs import BLIMP, FIELDS, SETS
from megatron_sas.evaluation.uas import RELATIONS, UAS
from megatron_sas.onsets.offline import Onset
from megatron_sas.report.analyse import Analysis
from megatron_sas.report.comparisons import Condition, runs_of
from megatron_sas.report.run_onsets import Order, RunOnset
from megatron_sas.report.statistics import NOT_MEASURED, show, true_minus
from megatron_sas.report.trajectories import TABLE_METRICS, Run
from megatron_sas.run.directory import describe_seeds


def onsets_json(analysis: Analysis) -> dict[str, Any]:
    """Onsets of every run and metric; null where there is none, with the reason."""
    entries = []
    for run in analysis.runs:
        entry: dict[str, Any] = {"run": str(run.path), "label": run.label, "lambda": run.describe_schedule()}
        entry["seed"] = run.seed
        for name, onset in analysis.onsets[run.path].items():
            entry[name] = {"break": _break_json(onset.strongest), "change_point": vars(onset.change)}
            if onset.above_offsets:
                difference, interval = onset.above_offsets
                entry[name]["above_fixed_offsets"] = {"difference": difference, "interval": interval}
            if onset.items:
                low, high = onset.interval or (None, None)
                entry[name]["bootstrap_over_items"] = {"low": low, "high": high}
        entries.append(entry)
    return {
        "megatron_sas": __version__,
        "delta_steps": analysis.delta,
        "replicates": analysis.replicates if analysis.with_items else 0,
        "runs": entries,
        "structure_before_capabilities": {label: _order_json(order) for label, order in analysis.orders.items()},
    }


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


def claims_json(analysis: Analysis) -> list[dict[str, Any]]:
    """Claims with their parts, rules, evidence and verdicts."""
    return [
        {
            "claim": claim.number,
            "statement": claim.statement,
            "verdict": claim.verdict,
            "missing": claim.missing,
            "parts": [vars(part) for part in claim.parts],
        }
        for claim in analysis.claims
    ]


def table_csv(conditions: Sequence[Condition]) -> str:
    """One row per condition, full precision; empty where a value is missing."""
    endings = ("", "_se", "_runs", "_difference", "_difference_se", "_p", "_holm")
    columns = ["condition", "role", "lambda", "runs", "last_step"]
    columns += [f"{metric.name}{ending}" for metric in TABLE_METRICS for ending in endings]
    rows = []
    for condition in conditions:
        last_step = max(run.final_step for run in condition.runs)
        row = [condition.label, condition.role, condition.runs[0].describe_schedule(), len(condition.runs), last_step]
        for metric in TABLE_METRICS:
            final, c = condition.final.get(metric.name), condition.difference.get(metric.name)
            row += [final.mean, final.error, final.count] if final else [None] * 3
            row += [c.value.mean, c.value.error, c.value.p, c.holm] if c else [None] * 4
        rows.append(row)
    return _csv(columns, rows)


def differences_csv(analysis: Analysis) -> str:
    """Every comparison of the report's tables: to the base, and to controls, each group a Holm family."""
    columns = ["family", "condition", "compared_with", "metric", "difference", "standard_error", "degrees_of_freedom"]
    columns += ["p", "p_holm", "test", "runs", "runs_compared_with"]
    to_base = [c for condition in analysis.conditions for c in condition.difference.values()]
    rows = []
    for family, comparisons in (("base", to_base), ("control", analysis.to_controls)):
        for c in comparisons:
            value, test = c.value, "paired t" if c.value.paired else "Welch t"
            row = [family, c.left, c.right, c.metric.name, value.mean, value.error, value.freedom]
            rows.append([*row, value.p, c.holm, test, *value.counts])
    return _csv(columns, rows)


def _csv(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([columns, *rows])
    return out.getvalue()


def table_markdown(conditions: Sequence[Condition]) -> str:
    """The paper's table to read: mean ± standard error over seeds."""
    rows = [["Condition", "λ", "Runs", "Steps", *(metric.title for metric in TABLE_METRICS)]]
    for condition in conditions:
        label, last_step = condition.label.replace("|", "\\|"), max(run.final_step for run in condition.runs)
        facts = [label, condition.runs[0].describe_schedule(), str(len(condition.runs)), str(last_step)]
        rows.append([*facts, *(show(condition.final.get(metric.name)) for metric in TABLE_METRICS)])
    head, *body = [f"| {' | '.join(row)} |\n" for row in rows]
    return "".join([head, "|---|---|--:|--:|" + "--:|" * len(TABLE_METRICS) + "\n", *body])


def relation_rows(conditions: Sequence[Condition]) -> list[dict[str, Any]]:
    """Accuracy of the best head per relation: baseline, then untrained and final of each condition, mean over its runs.

    Relations that the evaluation left out of its table (too few edges) are left out here too.
    """
    facts: dict[str, dict[str, Any]] = {}
    for run in runs_of(conditions):
        for relation, values in run.nested(RELATIONS.key).items():
            if values.get("in_table", True):
                facts.setdefault(relation, values)
    rows = []
    for relation, values in sorted(facts.items(), key=lambda item: -item[1].get("count", 0)):
        offset = values.get("baseline_offset")
        rows.append(
            {
                "name": relation,
                "count": values.get("count"),
                "baseline": values.get("baseline"),
                "offset": None if offset is None else true_minus(f"{offset:+d}"),
                "cells": _cells(conditions, UAS, RELATIONS.key, relation),
            }
        )
    return rows


def breakdown_rows(conditions: Sequence[Condition], by: str) -> list[dict[str, Any]]:
    """BLiMP by "field" or "set": each condition's untrained and final mean."""
    key = {"field": FIELDS, "set": SETS}[by].key
    names = sorted({name for run in runs_of(conditions) for name in run.nested(key)})
    return [{"name": name.replace("_", " "), "cells": _cells(conditions, BLIMP, key, name)} for name in names]


def _cells(conditions: Sequence[Condition], metric: Metric, key: str, name: str) -> list[dict[str, float | None]]:
    """By condition, the untrained and final accuracy in a row of a table, mean over the runs that end with `metric`."""
    return [
        {
            when: mean([_accuracy(run.nested(key, first=first).get(name)) for run in condition.ending[metric.name]])
            for when, first in (("untrained", True), ("final", False))
        }
        for condition in conditions
    ]


def _accuracy(value: Any) -> float | None:
    return value.get("accuracy") if isinstance(value, dict) else value


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of the values that are there; None when none is."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def run_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What each run was: model, data, length, λ, seed, devices, and the whole configuration."""
    rows = []
    for run in runs:
        start = {name: value for event in reversed(run.events) for name, value in event.items()}
        tokens, seconds = (run.curve(name, "train").values[-1:] for name in ("tokens", "seconds"))
        planned, device = run.setting("train.steps"), start.get("device")
        if "world_size" in start:
            device = f"{start['world_size']} × {device or 'process'}"
        facts = {
            "Condition": run.label,
            "Run": run.name,
            "Model": _model(run),
            "Parameters": f"{start['parameters'] / 1e6:.1f}M" if "parameters" in start else None,
            "Steps": f"{run.final_step}" + ("" if planned in (None, run.final_step) else f" of {planned}"),
            "Batch size": run.setting("train.global_batch_size"),
            "Tokens": f"{tokens[0] / 1e6:.1f}M" if len(tokens) else None,
            "Time": f"{seconds[0] / 60:.1f} min" if len(seconds) else None,
            "λ": run.describe_schedule(),
            "Seed": describe_seeds(run.config),
            "Devices": device,
        }
        text = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
        rows.append({"facts": facts, "name": run.name, "config": text})
    return rows


def _model(run: Run) -> str:
    """The architecture unless it is BERT's, the named size, and what replaces its own dimensions."""
    names = {"num_layers": "layers", "hidden_size": "wide", "num_heads": "heads"}
    changes = [f"{value} {word}" for name, word in names.items() if (value := run.setting(f"model.{name}"))]
    architecture = run.setting("model.architecture") or "bert"
    size = ("" if architecture == "bert" else f"{architecture} ") + (run.setting("model.size") or "base")
    return f"{size} ({', '.join(changes)})" if changes else size


def onset_cell(onset: RunOnset | None) -> dict[str, Any]:
    """A run's onset as text, with both kinds of intervals."""
    if onset is None:
        return {"step": NOT_MEASURED, "notes": ["not evaluated"], "is_detected": False}
    strongest, fit = onset.strongest, onset.change.interval
    doubt = "" if strongest.detected else f", {strongest.reason}"
    notes = [strongest.reason if strongest.step is None else f"bend {strongest.strength:.3f}{doubt}"]
    if onset.above_offsets:
        difference, (low, high) = onset.above_offsets
        notes.append(true_minus(f"above fixed offsets by {difference:.3f} ({low:.3f} to {high:.3f})"))
    if onset.interval:
        notes.append(f"items: {onset.interval[0]:.0f} to {onset.interval[1]:.0f}")
    notes.append(f"change point: {fit[0]:g} to {fit[1]:g}" if fit else f"no change point: {onset.change.reason}")
    step = NOT_MEASURED if strongest.step is None else f"{strongest.step:.0f}"
    return {"step": step, "notes": notes, "is_detected": strongest.detected}
