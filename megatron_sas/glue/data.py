"""Examples of GLUE tasks from TSV and JSON lines files, from a folder like the GLUE download, or from the hub."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sas.core.cli import InputError
from megatron_sas.corpus.readers.hub import read_rows
from megatron_sas.corpus.readers.text_lines import is_encodable, parse_json
from megatron_sas.evaluation.files import numbered_lines, read_text
from megatron_sas.glue.tasks import SCORE_RANGE, Task

HUB = "nyu-mll/glue"
MAX_BAD_SHARE = 0.01  # QQP as distributed has a few lines with too few columns; more of them are another layout


@dataclass(frozen=True)
class Examples:
    """The N examples of a file or a split of the hub."""

    texts: list[tuple[str, ...]]  # a sentence or a pair each
    labels: np.ndarray  # (N,), int64 class numbers or float32 scores
    source: dict[str, str]  # path, or the hub's name and split; and the SHA-256 of texts and labels

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Columns:
    """Names of columns that replace those of the task; None: the task's."""

    text: Sequence[str] | None = None
    label: str | None = None


def task_files(task: Task, directory: Path) -> tuple[Path, list[Path]]:
    """Training file and validation files of a task in a folder like the GLUE download; `InputError` if one lacks."""
    folder = directory / task.folder
    paths = [folder / "train.tsv", *(folder / name for name in task.validation)]
    for path in paths:
        if not path.is_file():
            raise InputError(f"{path}: no such file; --data takes a folder like the GLUE download")
    return paths[0], paths[1:]


def read_file(task: Task, path: str | Path, columns: Columns | None = None) -> Examples:
    """The examples of a .tsv or .jsonl file.

    TSV is split at tabs, without quoting, as GLUE is distributed; its first line names the columns, except in CoLA's
    own layout. Lines with too few columns are left out and counted on stderr, up to 1 %.

    Raises:
        InputError: an unreadable or empty file, a missing column, a label out of range, or fewer than two different
            labels.
    """
    path, columns = Path(path), columns or Columns()
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a .tsv or .jsonl file")
    lines = list(numbered_lines(path, read_text(path)))
    if path.suffix == ".tsv":
        rows = _tsv_rows(task, path, lines, columns)
    elif path.suffix == ".jsonl":
        rows = ((where, _json_object(line, where)) for line, where in lines)
    else:
        raise InputError(f"{path}: unknown kind of file {path.suffix!r}; name it .tsv or .jsonl")
    return _examples(task, rows, columns, {"path": str(path.resolve())}, str(path))


def read_hub(task: Task, split: str, hub: str = HUB) -> Examples:
    """The examples of a split of the data set `hub`, which has a configuration for every task.

    They are from the network, or the local cache of `datasets`.
    """
    where = f"{hub} {task.name} {split}"
    try:
        rows = [(f"{where}, row {n}", row) for n, row in enumerate(read_rows(f"hf:{hub}:{task.name}:{split}"), 1)]
    except InputError as error:
        reason = str(error).partition("(")[2].rpartition(")")[0] or str(error)
        raise InputError(
            f"--task {task.name}: {hub} cannot be read from the hub ({reason[:200]}); without a network give "
            "--data, or --train-file and --validation-file"
        ) from error
    return _examples(task, rows, Columns(), {"hub": hub, "split": split}, where)


def _tsv_rows(
    task: Task, path: Path, lines: list[tuple[str, str]], columns: Columns
) -> Iterator[tuple[str, dict[str, Any]]]:
    table = [(where, line.split("\t")) for line, where in lines]
    names = table[0][1] if table else []
    groups = (*task.text, task.label)
    known = {*itertools.chain(*groups), *(columns.text or ()), columns.label} & set(names)
    if task.positions is not None and columns == Columns() and not known:
        places = dict(zip([group[0] for group in groups], task.positions, strict=True))
    else:
        places = {name: place for place, name in enumerate(names)}
        last = max((places[name] for name in known), default=0)
        places = {name: place for name, place in places.items() if place <= last}
        table = table[1:]
    width = 1 + max(places.values(), default=0)
    short = [where for where, cells in table if len(cells) < width]
    if len(short) > MAX_BAD_SHARE * len(table):
        raise InputError(
            f"{short[0]}: fewer than the {width} tab-separated columns that {task.name} needs, as {len(short)} "
            f"of {len(table)} lines; is it another task's file?"
        )
    if short:
        print(f"{path}: left out {len(short)} of {len(table)} lines with too few columns", file=sys.stderr)
    for where, cells in table:
        if len(cells) >= width:
            yield where, {name: cells[place] for name, place in places.items()}


def _json_object(line: str, where: str) -> dict[str, Any]:
    row = parse_json(line, where)
    if not isinstance(row, dict):
        raise InputError(f"{where}: not a JSON object; write one example a line")
    return row


def _examples(task: Task, rows: Any, columns: Columns, source: dict[str, str], where: str) -> Examples:
    wanted = [(name,) for name in columns.text] if columns.text else list(task.text)
    label_names = (columns.label,) if columns.label else task.label
    texts, labels = [], []
    for place, row in rows:
        texts.append(tuple(_text(_pick(row, names, place), place) for names in wanted))
        labels.append(_label(task, _pick(row, label_names, place), place))
    if not texts:
        raise InputError(f"{where}: no examples in it; give a file with some")
    if len(set(labels)) < 2:
        name = task.classes[labels[0]] if task.classes else f"{labels[0]:g}"
        raise InputError(f"{where}: all {len(labels)} labels are {name!r}; there is nothing to tell apart")
    # Of what is learnt rather than of a file: the hub has none, and of a file the columns may be chosen.
    digest = hashlib.sha256()
    for text, label in zip(texts, labels, strict=True):
        digest.update(json.dumps([*text, label]).encode() + b"\n")
    source = {**source, "sha256": digest.hexdigest()}
    return Examples(texts, np.array(labels, np.float32 if task.is_regression else np.int64), source)


def _pick(row: dict[str, Any], names: Sequence[str], place: str) -> Any:
    for name in names:
        if name in row:
            return row[name]
    found = ", ".join(map(repr, row)) or "none"
    raise InputError(
        f"{place}: no column {' or '.join(map(repr, names))}, found {found[:200]}; "
        "--text-columns and --label-column name the columns"
    )


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{place}: {value!r} is not a text; --text-columns name the columns with the sentences")
    if not is_encodable(value):
        raise InputError(f"{place}: half of a surrogate pair in {value[:60]!r}; correct or remove it")
    return value


def _label(task: Task, value: Any, place: str) -> float | int:
    """The class number or score; GLUE's files name classes or number them, the hub numbers them."""
    if task.is_regression:
        try:
            score = float(value)
        except (TypeError, ValueError):
            score = math.nan
        if not SCORE_RANGE[0] <= score <= SCORE_RANGE[1]:
            raise InputError(f"{place}: label {value!r} is not a score from 0 to 5; correct or remove it")
        return score
    if value in task.classes:
        return task.classes.index(value)
    if str(value) == "-1":
        raise InputError(f"{place}: label -1 marks test data without labels; give the validation set")
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    number = int(text) if text.isdecimal() else -1
    if not 0 <= number < len(task.classes):
        names = ", ".join(task.classes)
        raise InputError(f"{place}: label {value!r} is none of 0 to {len(task.classes) - 1} or {names}; correct it")
    return number
