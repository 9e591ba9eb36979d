"""Reading runs and sweeps from their directories, with what was measured of their models afterwards."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_sas.core.cli import InputError, listed
from megatron_sas.evaluation.blimp_labels import renew_record
from megatron_sas.evaluation.minimal_pairs import many_ties
from megatron_sas.evaluation.registry import EVALUATIONS, snapshot_metrics
from megatron_sas.evaluation.uas import UAS
from megatron_sas.evaluation.validation import LOSS
from megatron_sas.glue.tasks import NOT_AVERAGED
from megatron_sas.report.trajectories import ROLES, Measured, Run
from megatron_sas.run.directory import CONFIG, RECORDS
from megatron_sas.run.records import read_records
from megatron_sas.trajectory.points import HINTS, ITEMS, TRAJECTORY, point_directory, read_points, read_settings

SWEEP_NAME = "sweep.json"
MIN_POINTS = 3  # a curve with fewer has no break
LACKING = 1  # measured snapshots may be so many fewer than live evaluations, in any stretch of a run, to replace them
REACHES = 0.9  # measured snapshots must cover this share of a run to stand for its curve
OWNERS = {e.metrics[0].name: e for e in sorted(EVALUATIONS.values(), key=lambda e: not e.metrics[0].title)}
"""Evaluations by the name of their first metric, those whose curve has a title first."""
GLUE_HINTS = (*HINTS, "hub", "split")  # where examples are from; their checksum decides


@dataclass(frozen=True)
class GlueResult:
    """A task that a model was fine-tuned on: `step` is the model's (None if unknown), `way` how and on what."""

    run: Run
    task: str
    mean: float
    step: int | None
    way: str


def read_inputs(paths: Sequence[str | Path], labels: Sequence[str] | None = None) -> tuple[list[Run], list[str]]:
    """Runs of run directories and sweep directories (which hold sweep.json), and notes about what was left out.

    A label stands for a condition: runs that share one are repetitions of it. Labels default to the directories'
    names; runs of a sweep are labelled with its conditions, and those that have not been evaluated yet are left out.
    Raises `InputError` as `load_runs`, for labels together with a sweep, and for a sweep without any begun run.
    """
    runs, notes, plain = [], [], []
    for path in map(Path, paths):
        if (path / SWEEP_NAME).is_file():
            if labels is not None:
                raise InputError(f"--labels: {path} is a sweep, which names its conditions itself; leave --labels out")
            more, left_out = read_sweep(path)
            runs += more
            notes += left_out
        else:
            plain.append(path)
    runs += load_runs(plain, labels)
    _check_not_repeated([run.path for run in runs])
    return choose_sources(runs, notes), notes


def load_runs(paths: Sequence[str | Path], labels: Sequence[str] | None = None) -> list[Run]:
    """Read run directories, with live evaluations as their curves (`read_inputs` also looks at measured ones and GLUE).

    Raises `InputError` for a path that is not a run directory, a broken file, a run without evaluations, a path given
    twice, or labels that do not match the runs in number.
    """
    if labels is not None and len(labels) != len(paths):
        raise InputError(
            f"--labels: {len(labels)} label(s) for {len(paths)} run(s); give one per run, in the same order"
        )
    resolved = [Path(path).resolve() for path in paths]
    _check_not_repeated(resolved)
    labels = labels or [path.name for path in resolved]
    return [load_run(path, label) for path, label in zip(resolved, labels, strict=True)]


def load_run(path: Path, label: str) -> Run:
    """Read one run directory; errors as `load_runs`."""
    if not path.is_dir():
        raise InputError(f"{path}: not a directory; give a run directory that contains {RECORDS} and {CONFIG}")
    records = sorted(map(renew_record, read_records(path / RECORDS)), key=lambda record: record["step"])
    by_kind = {kind: [r for r in records if r["kind"] == kind] for kind in ("train", "evaluation", "event")}
    measured = read_measured(path)
    if not by_kind["evaluation"] and not measured.records:
        raise InputError(f"{path / RECORDS}: no evaluations; train with live evaluation switched on")
    config = _read_config(path / CONFIG)
    run = Run(path, label, config, by_kind["train"], by_kind["evaluation"], by_kind["event"], measured=measured)
    return replace(run, training_loss=not _steps(run.evaluations, LOSS.key))


def read_sweep(directory: Path) -> tuple[list[Run], list[str]]:
    """The runs of a sweep that have been evaluated, and a note on the others; `InputError` for a broken sweep.json."""
    path = directory / SWEEP_NAME
    content = _read_sweep_file(path)
    runs, missing = [], []
    for entry in content.get("runs", []):
        try:
            where, condition, seed = directory / entry["directory"], str(entry["condition"]), int(entry["seed"])
            role, release = entry.get("role"), entry.get("release_step")
        except (TypeError, KeyError, ValueError):
            raise InputError(f"{path}: a run without directory, condition or seed; write the file again") from None
        if role not in (None, *ROLES):
            raise InputError(f"{path}: role {role!r} of {entry['directory']}; use one of {', '.join(ROLES)}")
        if not _has_begun(where):
            missing.append(entry["directory"])
            continue
        run = load_run(where.resolve(), condition)
        runs.append(replace(run, assigned_role=role, assigned_seed=seed, assigned_release=release))
    if not runs:
        raise InputError(f"{path}: none of its {len(missing)} run(s) has been evaluated yet; run the sweep first")
    if not missing:
        return runs, []
    return runs, [
        f"{len(missing)} of {len(missing) + len(runs)} runs have no evaluation yet, so are left out: {listed(missing)}."
    ]


def sweep_title(paths: Sequence[str | Path]) -> str | None:
    """The title of a sweep that is all there is to read; None for several inputs, or runs.

    Raises `InputError` for a broken sweep.json.
    """
    if len(paths) != 1 or not (Path(paths[0]) / SWEEP_NAME).is_file():
        return None
    title = _read_sweep_file(Path(paths[0]) / SWEEP_NAME).get("title")
    return title if isinstance(title, str) and title else None


def _read_sweep_file(path: Path) -> dict[str, Any]:
    content = _read_json(path)
    if content.get("format") != "megatron_sas sweep" or content.get("version") != 1:
        raise InputError(f"{path}: not a sweep of version 1; give the directory that tools/run_sweep.py wrote")
    return content


def read_measured(run: Path) -> Measured:
    """What lies in a run's `trajectory/points`; empty where there is nothing."""
    directory = run / TRAJECTORY
    records, counts, item_steps = [], {}, []
    relations, edge_counts = (), np.zeros(0, np.int64)
    for point in read_points(directory):
        path = point_directory(directory, point["step"])
        records.append(_as_record(point))
        table = point.get(UAS.point[0], {}).get("counts")
        if table:
            names = tuple(table["relations"])
            if relations and names != relations:
                raise InputError(f"{path}: other relations than in the points before it; measure the run again")
            relations = names
            edge_counts = np.array([point[UAS.point[0]]["relations"][name]["count"] for name in names], np.int64)
            counts[point["step"]] = np.array(table["correct"], np.int64)
        if (path / ITEMS).is_file():
            item_steps.append(point["step"])
    return Measured(
        records,
        relations,
        edge_counts,
        counts,
        directory,
        tuple(item_steps),
        read_settings(directory) if records else None,
    )


def choose_sources(runs: Sequence[Run], notes: list[str]) -> list[Run]:
    """Runs whose curves come from one source per metric: measured snapshots where all runs have them, else live.

    The two are never mixed within a metric, since they rest on different sentences; nor are measurements on different
    data or in different precision, nor live evaluations of other edges or pairs. The training loss stands for a loss on
    held-out text where no run has one. Adds to `notes` what was decided against values that exist.
    """
    sources = {name: _measured_runs(runs, name, notes) for name in OWNERS}
    for name, owner in OWNERS.items():
        if owner.item_counts is not None and not sources[name]:
            runs = _on_the_same_items(runs, name, notes)
    glue = choose_glue(runs, notes)
    chosen = [_with_sources(run, sources, glue[run.path]) for run in runs]
    _note_what_curves_lack(chosen, notes)
    held_out = any(_steps(run.evaluations, LOSS.key) for run in chosen)
    if not held_out:
        notes.append("No run has a loss on held-out text: the loss is that of training, averaged between evaluations.")
    return [replace(run, training_loss=not held_out) for run in chosen]


def _note_what_curves_lack(runs: Sequence[Run], notes: list[str]) -> None:
    """Add notes on values that are not finite, which no curve has, and on pairs that a model does not decide."""
    for key in (owner.metrics[0].key for owner in OWNERS.values()):
        lacking = [(run, sum(key in record and record[key] is None for record in run.evaluations)) for run in runs]
        if bad := [f"{run.label} ({run.name}) {count}" for run, count in lacking if count]:
            notes.append(f"{key}: evaluations without a finite value are left out of the curves: {listed(bad)}.")
    unmerged = [f"{run.label} ({run.name})" for run in runs if any("blimp_unmerged" in r for r in run.evaluations)]
    if unmerged:
        notes.append(
            "blimp: fields that were recorded under two names are left out where the sets behind them are not known: "
            f"{listed(unmerged)}."
        )
    last = [(run, many_ties(run.evaluations[-1])) for run in runs if run.evaluations]
    if tied := [f"{run.label} ({run.name}) {ties[0]} of {ties[1]}" for run, ties in last if ties is not None]:
        notes.append(f"blimp: models end with many ties, which count as wrong: {listed(tied)}.")


def _on_the_same_items(runs: Sequence[Run], name: str, notes: list[str]) -> list[Run]:
    """Runs whose live values of a metric are all of the same edges or pairs, as far as the records count them.

    `evaluation` may change while a run goes on, and in a branch: of a run the newest items count, of all runs the most
    usual ones (of equally usual ones the first).
    """
    newest = {run.path: next(filter(None, (_items(r, name) for r in reversed(run.evaluations))), None) for run in runs}
    known = Counter(filter(None, newest.values()))
    usual = known.most_common(1)[0][0] if known else None
    result, changed, odd = [], [], []
    for run in runs:
        others = [_items(record, name) not in (None, usual) for record in run.evaluations]
        if any(others):
            (changed if newest[run.path] == usual else odd).append(f"{run.label} ({run.name})")
        records = [
            {key: value for key, value in record.items() if key not in _keys(name)} if other else record
            for record, other in zip(run.evaluations, others, strict=True)
        ]
        result.append(replace(run, evaluations=records))
    key, number = OWNERS[name].metrics[0].key, len(runs)
    if changed:
        notes.append(
            f"{key}: live evaluations of {len(changed)} of {number} runs changed to other items on the way, so their "
            f"earlier values are left out: {listed(changed)}."
        )
    if odd:
        notes.append(
            f"{key}: live evaluations of {len(odd)} of {number} runs are of other items than those of the rest, so "
            f"their values are left out: {listed(odd)}."
        )
    return result


def _keys(name: str) -> set[str]:
    """The keys of evaluation lines that belong to a curve, which all come from one source."""
    return {metric.key for metric in OWNERS[name].metrics}


def _items(record: Mapping[str, Any], name: str) -> str | None:
    """The numbers of edges or pairs that an evaluation line's value is of, as text; None where it does not tell."""
    table, count = OWNERS[name].item_counts
    rows = record.get(table)
    if not isinstance(rows, dict) or not all(isinstance(row, dict) and row.get(count) for row in rows.values()):
        return None
    return json.dumps({key: row[count] for key, row in rows.items()}, sort_keys=True) if rows else None


def choose_glue(runs: Sequence[Run], notes: list[str]) -> dict[Path, dict[str, float]]:
    """Means of the GLUE tasks that all runs with GLUE have, by path of the run; without those that averages leave out.

    Only results of a run's final step count, and of these, for each task, only those that were made in the most usual
    way (of equally usual ones the first). Adds to `notes` what was left out.
    """
    results = [result for run in runs for result in _read_glue(run) if result.task not in NOT_AVERAGED]
    fault = "are not known to be of their run's last step"
    results = _keep(results, [r.step == r.run.final_step for r in results], fault, notes)
    ways: dict[str, Counter[str]] = {}
    for result in results:
        ways.setdefault(result.task, Counter())[result.way] += 1
    usual = {task: counter.most_common(1)[0][0] for task, counter in ways.items()}
    fault = "were made on other data, or with other settings or seeds, than the rest"
    results = _keep(results, [r.way == usual[r.task] for r in results], fault, notes)
    means: dict[Path, dict[str, float]] = {run.path: {} for run in runs}
    for result in results:
        means[result.run.path][result.task] = result.mean
    tasks = [found.keys() for found in means.values() if found]
    common = set.intersection(*map(set, tasks)) if tasks else set()
    if any(task != common for task in tasks):
        notes.append(
            f"GLUE is the mean over the tasks that all runs with GLUE have: {', '.join(sorted(common)) or '–'}."
        )
    return {path: {task: mean for task, mean in found.items() if task in common} for path, found in means.items()}


def _keep(results: Sequence[GlueResult], kept: Sequence[bool], fault: str, notes: list[str]) -> list[GlueResult]:
    """The results that are `kept`; a note names the others, and their `fault`."""
    if odd := [f"{r.run.label} ({r.run.name}) {r.task}" for r, keep in zip(results, kept, strict=True) if not keep]:
        notes.append(f"GLUE: {len(odd)} of {len(results)} results {fault}, so they are left out: {listed(odd)}.")
    return [result for result, keep in zip(results, kept, strict=True) if keep]


def _read_glue(run: Run) -> list[GlueResult]:
    """What lies in a run's `glue`; `InputError` for anything but results of tools/finetune_glue.py."""
    results = []
    for path in sorted(run.path.glob("glue/*.json")):
        content = _read_json(path)
        try:
            if content["format"] != "megatron_sas glue":
                raise ValueError
            sources = [content["data"]["train"], *content["data"]["validation"]]
            data = [{k: v for k, v in source.items() if k not in GLUE_HINTS} for source in sources]
            seeds = [seed["seed"] for seed in content["seeds"]]
            way = json.dumps([content["metric"], content["settings"], data, seeds], sort_keys=True)
            results.append(GlueResult(run, content["task"], float(content["mean"]), content.get("model_step"), way))
        except (KeyError, TypeError, ValueError, AttributeError):
            raise InputError(f"{path}: not a result of tools/finetune_glue.py; move it elsewhere") from None
    return results


def _with_sources(run: Run, sources: Mapping[str, set[Path]], glue: dict[str, float]) -> Run:
    """The run with evaluations merged from live and measured records, by step."""
    not_live = {key for name in OWNERS if sources[name] for key in _keys(name)}
    measured = {name for name in OWNERS if run.path in sources[name]}
    not_measured = {key for name in OWNERS.keys() - measured for key in _keys(name)}
    merged: dict[int, dict[str, Any]] = {}
    for record in run.evaluations:
        merged.setdefault(record["step"], {}).update({k: v for k, v in record.items() if k not in not_live})
    for record in run.measured.records:
        merged.setdefault(record["step"], {}).update({k: v for k, v in record.items() if k not in not_measured})
    with_items = {*run.measured.item_steps} >= {record["step"] for record in run.measured.records}
    return replace(
        run,
        evaluations=[merged[step] for step in sorted(merged)],
        measured=replace(run.measured, glue=glue),
        item_metrics=frozenset(name for name in measured if with_items and OWNERS[name].items is not None),
    )


def _measured_runs(runs: Sequence[Run], name: str, notes: list[str]) -> set[Path]:
    """Paths of the runs whose measured values of a metric count; none where live evaluations serve all runs.

    Where no run has live values, these are the runs measured in the most usual way (of equally usual ones the first).
    """
    key = OWNERS[name].metrics[0].key
    steps = [_steps(run.measured.records, key) for run in runs]
    having = [run for run, has in zip(runs, steps, strict=True) if has]
    if not having:
        return set()
    ways = {run.path: json.dumps(_way(run, OWNERS[name].input), sort_keys=True) for run in having}
    if not any(key in record for run in runs for record in run.evaluations):
        usual = Counter(ways.values()).most_common(1)[0][0]
        odd = [run for run in having if ways[run.path] != usual]
        if odd:
            named = listed([f"{run.label} ({run.name})" for run in odd])
            notes.append(
                f"{key}: {len(odd)} of {len(having)} runs were measured on other data or in another precision than the "
                f"rest, so their values are left out: {named}."
            )
        return {run.path for run in having} - {run.path for run in odd}
    enough = all(
        len(has) >= MIN_POINTS
        and max(has) >= REACHES * run.final_step
        and _most_lacking(_steps(run.evaluations, key), has) <= LACKING
        for run, has in zip(runs, steps, strict=True)
    )
    if enough and len(set(ways.values())) == 1:
        return {run.path for run in runs}
    notes.append(
        f"{len(having)} of {len(runs)} runs have measured snapshots with {key}, but not all of them with the same "
        "settings, to the end, and everywhere as densely as live evaluations: live evaluations are used instead."
    )
    return set()


def _steps(records: Sequence[Mapping[str, Any]], key: str) -> set[int]:
    """The steps with a value of `key`."""
    return {record["step"] for record in records if record.get(key) is not None}


def _most_lacking(live: set[int], measured: set[int]) -> int:
    """How many more live evaluations than snapshots there are in the stretch of a run where these lack most.

    The whole run is such a stretch, and so is every part of it: many snapshots where nothing happens do not make up for
    few where something does. Snapshots at slightly other steps lack one, those half as dense half.
    """
    most = lacking = 0  # anywhere so far, and in the worst stretch that ends at `step`
    for step in sorted(live | measured):
        lacking = max(0, lacking + (step in live) - (step in measured))
        most = max(most, lacking)
    return most


def _way(run: Run, part: str) -> list[Any]:
    """On what and how a part was measured. Where the input lies may differ between machines; what it is may not."""
    settings = run.measured.settings or {}
    content = {k: v for k, v in (settings.get(part) or {}).items() if k not in HINTS}
    return [content, settings.get("precision")]


def _as_record(point: dict[str, Any]) -> dict[str, Any]:
    """A point in the shape of an evaluation line; parts that were not measured are absent."""
    present = [metric for metric in snapshot_metrics() if metric.point[0] in point]
    values = {metric.key: metric.in_point(point) for metric in present}
    return {"kind": "evaluation", "step": point["step"], **values}


def _has_begun(run: Path) -> bool:
    """Whether there is anything to draw: an evaluation, live or of a snapshot."""
    if not (run / RECORDS).is_file() or not (run / CONFIG).is_file():
        return False
    evaluated = any(record["kind"] == "evaluation" for record in read_records(run / RECORDS))
    return evaluated or bool(read_points(run / TRAJECTORY))


def _check_not_repeated(paths: Sequence[Path]) -> None:
    for path in paths:
        if paths.count(path) > 1:
            raise InputError(f"{path}: given more than once; name each run once")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # includes UnicodeDecodeError
        content = None
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a JSON object; write it again, or remove it")
    return content


def _read_config(path: Path) -> dict[str, Any]:
    """The configuration as plain values: not validated, so that runs of other versions can be compared too."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a run directory as the trainer left it")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        config = None
    if not isinstance(config, dict):
        raise InputError(f"{path}: not a YAML configuration; restore the file that the trainer wrote")
    return config
