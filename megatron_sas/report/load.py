"""Reading runs and sweeps from their directories, with what was measured of their models afterwards."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_sas.core.cli import InputError, listed
from megatron_sas.evaluation.base import Evaluation
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
OWNERS = sorted(EVALUATIONS.values(), key=lambda evaluation: not evaluation.metrics[0].title)
"""Evaluations, those whose curve has a title first. All metrics of one come from the same source."""
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
        if not (path / SWEEP_NAME).is_file():
            plain.append(path)
            continue
        if labels is not None:
            raise InputError(f"--labels: {path} is a sweep, which names its conditions itself; leave --labels out")
        more, left_out = read_sweep(path)
        runs += more
        notes += left_out
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
    train, evaluations, events = ([r for r in records if r["kind"] == k] for k in ("train", "evaluation", "event"))
    measured = read_measured(path)
    if not evaluations and not measured.records:
        raise InputError(f"{path / RECORDS}: no evaluations; train with live evaluation switched on")
    config = _read_config(path / CONFIG)
    training_loss = not _steps(evaluations, LOSS.key)
    return Run(path, label, config, train, evaluations, events, measured=measured, training_loss=training_loss)


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
    total = len(runs) + len(missing)
    return runs, [f"{len(missing)} of {total} runs have no evaluation yet, so are left out: {listed(missing)}."]


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


def _has_begun(run: Path) -> bool:
    """Whether there is anything to draw: an evaluation, live or of a snapshot."""
    if not (run / RECORDS).is_file() or not (run / CONFIG).is_file():
        return False
    evaluated = any(record["kind"] == "evaluation" for record in read_records(run / RECORDS))
    return evaluated or bool(read_points(run / TRAJECTORY))


def read_measured(run: Path) -> Measured:
    """What lies in a run's `trajectory/points`; empty where there is nothing."""
    directory = run / TRAJECTORY
    points = read_points(directory)
    if not points:
        return Measured()
    relations, edge_counts, head_counts = (), np.zeros(0, np.int64), {}
    for point in points:
        uas = point.get(UAS.point[0], {})
        if table := uas.get("counts"):
            names = tuple(table["relations"])
            if relations and names != relations:
                where = point_directory(directory, point["step"])
                raise InputError(f"{where}: other relations than in the points before it; measure the run again")
            relations = names
            edge_counts = np.array([uas["relations"][name]["count"] for name in names], np.int64)
            head_counts[point["step"]] = np.array(table["correct"], np.int64)
    with_items = [p["step"] for p in points if (point_directory(directory, p["step"]) / ITEMS).is_file()]
    records = [_as_record(point) for point in points]
    settings = read_settings(directory)
    return Measured(records, relations, edge_counts, head_counts, directory, tuple(with_items), settings)


def _as_record(point: dict[str, Any]) -> dict[str, Any]:
    """A point in the shape of an evaluation line; parts that were not measured are absent."""
    values = {metric.key: metric.in_point(point) for metric in snapshot_metrics() if metric.point[0] in point}
    return {"kind": "evaluation", "step": point["step"], **values}


def choose_sources(runs: Sequence[Run], notes: list[str]) -> list[Run]:
    """Runs whose curves come from one source per metric: measured snapshots where all runs have them, else live.

    The two are never mixed within a metric, since they rest on different sentences; nor are measurements on different
    data or in different precision, nor live evaluations of other edges or pairs. The training loss stands for a loss on
    held-out text where no run has one. Adds to `notes` what was decided against values that exist.
    """
    sources = [(owner, _measured_runs(runs, owner, notes)) for owner in OWNERS]
    for owner, measured in sources:
        if owner.item_counts is not None and not measured:
            runs = _on_the_same_items(runs, owner, notes)
    glue = choose_glue(runs, notes)
    chosen = [_with_sources(run, sources, glue[run.path]) for run in runs]
    _note_what_curves_lack(chosen, notes)
    held_out = any(_steps(run.evaluations, LOSS.key) for run in chosen)
    if not held_out:
        notes.append("No run has a loss on held-out text: the loss is that of training, averaged between evaluations.")
    return [replace(run, training_loss=not held_out) for run in chosen]


def _note_what_curves_lack(runs: Sequence[Run], notes: list[str]) -> None:
    """Add notes on values that are not finite, which no curve has, and on pairs that a model does not decide."""
    for key in (owner.metrics[0].key for owner in OWNERS):
        lacking = [(run, sum(key in record and record[key] is None for record in run.evaluations)) for run in runs]
        if bad := [f"{run.title} {count}" for run, count in lacking if count]:
            notes.append(f"{key}: evaluations without a finite value are left out of the curves: {listed(bad)}.")
    if unmerged := [run.title for run in runs if any("blimp_unmerged" in r for r in run.evaluations)]:
        notes.append(
            "blimp: fields that were recorded under two names are left out where the sets behind them are not known: "
            f"{listed(unmerged)}."
        )
    last = [(run, many_ties(run.evaluations[-1])) for run in runs if run.evaluations]
    if tied := [f"{run.title} {ties[0]} of {ties[1]}" for run, ties in last if ties is not None]:
        notes.append(f"blimp: models end with many ties, which count as wrong: {listed(tied)}.")


def _on_the_same_items(runs: Sequence[Run], owner: type[Evaluation], notes: list[str]) -> list[Run]:
    """Runs whose live values of an evaluation are all of the same edges or pairs, as far as the records count them.

    `evaluation` may change while a run goes on, and in a branch: of a run the newest items count, of all runs the most
    usual ones.
    """
    items = {run.path: [_items(record, owner) for record in run.evaluations] for run in runs}
    newest = {path: next(filter(None, reversed(known)), None) for path, known in items.items()}
    usual = most_usual(filter(None, newest.values()))
    changed, odd = [], []
    for run in runs:
        if any(known not in (None, usual) for known in items[run.path]):
            (changed if newest[run.path] == usual else odd).append(run.title)
    for named, what in (
        (changed, "changed to other items on the way, so their earlier values are left out"),
        (odd, "are of other items than those of the rest, so their values are left out"),
    ):
        if named:
            which = f"{owner.metrics[0].key}: live evaluations of {len(named)} of {len(runs)} runs"
            notes.append(f"{which} {what}: {listed(named)}.")

    def kept(run: Run) -> list[dict[str, Any]]:
        pairs = zip(run.evaluations, items[run.path], strict=True)
        return [r if known in (None, usual) else _without(r, _keys([owner])) for r, known in pairs]

    return [replace(run, evaluations=kept(run)) for run in runs]


def _items(record: Mapping[str, Any], owner: type[Evaluation]) -> str | None:
    """The numbers of edges or pairs that an evaluation line's value is of, as text; None where it does not tell."""
    table, count = owner.item_counts
    rows = record.get(table)
    if not isinstance(rows, dict) or not all(isinstance(row, dict) and row.get(count) for row in rows.values()):
        return None
    return _as_text({key: row[count] for key, row in rows.items()}) if rows else None


def choose_glue(runs: Sequence[Run], notes: list[str]) -> dict[Path, dict[str, float]]:
    """Means of the GLUE tasks that all runs with GLUE have, by path of the run; without those that averages leave out.

    Only results of a run's final step count, and of these, for each task, only those that were made in the most usual
    way. Adds to `notes` what was left out.
    """
    results = [result for run in runs for result in _read_glue(run) if result.task not in NOT_AVERAGED]
    fault = "are not known to be of their run's last step"
    results = _keep(results, lambda result: result.step == result.run.final_step, fault, notes)
    usual = {result.task: most_usual(r.way for r in results if r.task == result.task) for result in results}
    fault = "were made on other data, or with other settings or seeds, than the rest"
    results = _keep(results, lambda result: result.way == usual[result.task], fault, notes)
    means: dict[Path, dict[str, float]] = {run.path: {} for run in runs}
    for result in results:
        means[result.run.path][result.task] = result.mean
    tasks = [set(of_run) for of_run in means.values() if of_run]
    common = set.intersection(*tasks) if tasks else set()
    if any(task != common for task in tasks):
        notes.append(
            f"GLUE is the mean over the tasks that all runs with GLUE have: {', '.join(sorted(common)) or '–'}."
        )
    return {path: {task: mean for task, mean in of_run.items() if task in common} for path, of_run in means.items()}


def _keep(
    results: Sequence[GlueResult], is_kept: Callable[[GlueResult], bool], fault: str, notes: list[str]
) -> list[GlueResult]:
    """The results that `is_kept` holds of; a note names the others, and their `fault`."""
    if odd := [f"{result.run.title} {result.task}" for result in results if not is_kept(result)]:
        notes.append(f"GLUE: {len(odd)} of {len(results)} results {fault}, so they are left out: {listed(odd)}.")
    return [result for result in results if is_kept(result)]


def _read_glue(run: Run) -> list[GlueResult]:
    """What lies in a run's `glue`; `InputError` for anything but results of tools/finetune_glue.py."""
    results = []
    for path in sorted(run.path.glob("glue/*.json")):
        content = _read_json(path)
        try:
            if content["format"] != "megatron_sas glue":
                raise ValueError
            data = [_without(s, GLUE_HINTS) for s in (content["data"]["train"], *content["data"]["validation"])]
            seeds = [seed["seed"] for seed in content["seeds"]]
            way = _as_text([content["metric"], content["settings"], data, seeds])
            results.append(GlueResult(run, content["task"], float(content["mean"]), content.get("model_step"), way))
        except (KeyError, TypeError, ValueError, AttributeError):
            raise InputError(f"{path}: not a result of tools/finetune_glue.py; move it elsewhere") from None
    return results


def _with_sources(run: Run, sources: Sequence[tuple[type[Evaluation], set[Path]]], glue: dict[str, float]) -> Run:
    """The run with evaluations merged from live and measured records, by step."""
    measured = [owner for owner, paths in sources if run.path in paths]
    not_live = _keys([owner for owner, paths in sources if paths])
    not_measured = _keys([owner for owner in OWNERS if owner not in measured])
    merged: dict[int, dict[str, Any]] = {}
    for records, excluded in ((run.evaluations, not_live), (run.measured.records, not_measured)):
        for record in records:
            merged.setdefault(record["step"], {}).update(_without(record, excluded))
    with_items = {*run.measured.item_steps} >= {record["step"] for record in run.measured.records}
    return replace(
        run,
        evaluations=[merged[step] for step in sorted(merged)],
        measured=replace(run.measured, glue=glue),
        item_metrics=frozenset(owner.metrics[0].name for owner in measured if with_items and owner.items is not None),
    )


def _measured_runs(runs: Sequence[Run], owner: type[Evaluation], notes: list[str]) -> set[Path]:
    """Paths of the runs whose measured values of an evaluation count; none where live evaluations serve all runs.

    Where no run has live values, these are the runs measured in the most usual way.
    """
    key = owner.metrics[0].key
    measured = {run.path: _steps(run.measured.records, key) for run in runs}
    having = [run for run in runs if measured[run.path]]
    if not having:
        return set()
    ways = {run.path: _way(run, owner.input) for run in having}
    if not any(key in record for run in runs for record in run.evaluations):
        usual = most_usual(ways.values())
        if odd := [run for run in having if ways[run.path] != usual]:
            notes.append(
                f"{key}: {len(odd)} of {len(having)} runs were measured on other data or in another precision than the "
                f"rest, so their values are left out: {listed([run.title for run in odd])}."
            )
        return {path for path, way in ways.items() if way == usual}
    enough = all(
        len(steps := measured[run.path]) >= MIN_POINTS
        and max(steps) >= REACHES * run.final_step
        and _most_lacking(_steps(run.evaluations, key), steps) <= LACKING
        for run in runs
    )
    if enough and len(set(ways.values())) == 1:
        return {run.path for run in runs}
    notes.append(
        f"{len(having)} of {len(runs)} runs have measured snapshots with {key}, but not all of them with the same "
        "settings, to the end, and everywhere as densely as live evaluations: live evaluations are used instead."
    )
    return set()


def _way(run: Run, part: str) -> str:
    """On what and how a part was measured. Where the input lies may differ between machines; what it is may not."""
    settings = run.measured.settings
    return _as_text([_without(settings.get(part) or {}, HINTS), settings.get("precision")])


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


def most_usual(values: Iterable[str]) -> str | None:
    """The most frequent value, of equally frequent ones the first; None without any."""
    return next((value for value, _ in Counter(values).most_common(1)), None)


def _steps(records: Sequence[Mapping[str, Any]], key: str) -> set[int]:
    """The steps with a value of `key`."""
    return {record["step"] for record in records if record.get(key) is not None}


def _keys(owners: Sequence[type[Evaluation]]) -> set[str]:
    """The keys of evaluation lines that belong to these evaluations."""
    return {metric.key for owner in owners for metric in owner.metrics}


def _without(values: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def _as_text(value: Any) -> str:
    """A JSON value as text that is the same for equal values."""
    return json.dumps(value, sort_keys=True)


def _check_not_repeated(paths: Sequence[Path]) -> None:
    for path in paths:
        if paths.count(path) > 1:
            raise InputError(f"{path}: given more than once; name each run once")


def _read_config(path: Path) -> dict[str, Any]:
    """The configuration as plain values: not validated, so that runs of other versions can be compared too."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a run directory as the trainer left it")
    return _read_mapping(path, yaml.safe_load, "not a YAML configuration; restore the file that the trainer wrote")


def _read_json(path: Path) -> dict[str, Any]:
    return _read_mapping(path, json.loads, "not a JSON object; write it again, or remove it")


def _read_mapping(path: Path, parse: Callable[[str], Any], fault: str) -> dict[str, Any]:
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError):  # UnicodeDecodeError is a ValueError
        content = None
    if not isinstance(content, dict):
        raise InputError(f"{path}: {fault}")
    return content
