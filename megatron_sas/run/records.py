"""Metrics of a run: `metrics.jsonl`, one JSON object a line, and the same numbers in TensorBoard.

A line is `{"kind": "train" | "evaluation" | "event", "step": int, "time": unix seconds, ...values}`. Lines are appended
whole, so a killed process leaves at most one torn line, at the end; a resumed run cuts the file back to the step it
resumes from.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from megatron_sas.core.cli import InputError
from megatron_sas.core.files import write_bytes_atomic
from megatron_sas.core.settings import Section
from megatron_sas.run.directory import RECORDS, RunDirectory
from megatron_sas.run.event_files import cut_event_files

KINDS = ("train", "evaluation", "event")


class LoggingSection(Section):
    """Records of every step; they are read off the device and written every `every` steps."""

    every: int = Field(10, description="steps between writes", ge=1)
    tensorboard: bool = Field(True, description="also write TensorBoard files")


class Records:
    """Writes the metrics of one run; only rank 0 has one."""

    def __init__(self, run_dir: str | Path, resume_step: int, tensorboard: bool) -> None:
        """Open `run_dir/metrics.jsonl` and, if `tensorboard`, an event file in `run_dir/tensorboard`.

        Lines and TensorBoard points up to `resume_step` (-1: none) are kept and later ones cut off, so that a resumed
        run has neither gaps nor overlaps.
        """
        run = RunDirectory(run_dir)
        self.path, self._board_directory = run.records, run.tensorboard
        self._written: set[tuple[str, int]] = set()  # except training's lines, of which there may be millions
        self._events: set[str] = set()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self._cut_back(resume_step)
        cut_event_files(run.tensorboard, resume_step)
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._board = None
        if tensorboard:
            # Imported here: it takes a second, and a run without TensorBoard does not need the package.
            from tensorboard.compat.proto.summary_pb2 import Summary
            from torch.utils.tensorboard import SummaryWriter

            self._points = Summary
            # A page that is open already hears of the cut by `purge_step`.
            self._board = SummaryWriter(str(run.tensorboard), purge_step=resume_step + 1)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Append one line and its TensorBoard points.

        `values` may be nested dictionaries and may hold NumPy or torch scalars; NaN and infinities become null in the
        JSON. TensorBoard tags are `kind/name`, or `name/key/…` for a nested dictionary. Raises `ValueError` for an
        unknown kind or a value named like a field of the line, `OSError` when the line cannot be written whole.
        """
        if kind not in KINDS:
            raise ValueError(f"unknown kind of record {kind!r}; one of {', '.join(KINDS)}")
        if reserved := {"kind", "step", "time"} & values.keys():
            raise ValueError(f"reserved names in a record: {', '.join(sorted(reserved))}")
        now = time.time()
        line = {"kind": kind, "step": int(step), "time": round(now, 3), **_plain(values)}
        self._append(json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        self._remember(line)
        self._show(kind, step, now, values)
        if kind != "train":  # rare and slow to produce: show them at once
            self._flush_board()

    def show_past(self) -> None:
        """Give TensorBoard, which has nothing yet, all lines that the file began with."""
        for line in iterate_records(self.path) if self._board is not None else ():
            kind, step, when = line.pop("kind"), line.pop("step"), line.pop("time", None)
            self._show(kind, step, when, line)

    def has(self, kind: str, step: int) -> bool:
        """Whether a line exists for `step` of a kind other than "train": a resumed run asks for its evaluations."""
        return (kind, step) in self._written

    def has_event(self, name: str) -> bool:
        """Whether an event of that name was recorded, by this process or before."""
        return name in self._events

    def flush(self) -> None:
        """Flush and fsync everything written so far."""
        os.fsync(self._descriptor)
        self._flush_board()

    def close(self) -> None:
        """Close the files. Further writes are errors; closing twice is not."""
        if self._board is not None:
            board, self._board = self._board, None
            with self._naming_the_board():
                board.close()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _show(self, kind: str, step: int, when: float | None, values: dict[str, Any]) -> None:
        if self._board is None:
            return
        points = self._points()
        with self._naming_the_board():
            for tag, value in _tags(kind, values):
                if isinstance(value, str):
                    self._board.add_text(tag, value, step, when)
                else:
                    points.value.add(tag=tag, simple_value=value)
            # One event: `add_scalar` makes one of each point, and takes as long for it as the rest of a record.
            if points.value:
                self._board.file_writer.add_summary(points, step, when)

    def _flush_board(self) -> None:
        if self._board is not None:
            with self._naming_the_board():
                self._board.flush()

    @contextlib.contextmanager
    def _naming_the_board(self) -> Iterator[None]:
        """TensorBoard writes in a thread, whose errors come with the next call and without a path."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._board_directory)) from None

    def _remember(self, record: dict[str, Any]) -> None:
        if record["kind"] != "train":
            self._written.add((record["kind"], record["step"]))
        if record["kind"] == "event":
            self._events.add(record.get("event"))

    def _append(self, line: bytes) -> None:
        written = os.write(self._descriptor, line)
        if written != len(line):  # a full disk takes part of a line: take it back, or the next line would be broken
            os.ftruncate(self._descriptor, os.fstat(self._descriptor).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def _cut_back(self, step: int) -> None:
        kept = lines_until(self.path, step)
        for record in map(_parse, kept.split(b"\n")[:-1]):
            self._remember(record)
        if kept != self.path.read_bytes():
            write_bytes_atomic(self.path, kept)


def lines_until(path: Path, step: int) -> bytes:
    """The lines of a `metrics.jsonl` that are records with a step of at most `step`, as they are."""
    kept, broken = [], 0
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        record = _parse(line)
        if record is None:
            broken += bool(line.strip()) and number < len(lines)  # a torn last line is what a kill leaves
        elif record["step"] <= step:
            kept.append(line + b"\n")
    if broken:
        print(f"{path}: dropped {broken} unreadable line(s)", file=sys.stderr)
    return b"".join(kept)


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """All records of a `metrics.jsonl`, in file order; null stays None.

    A last line without its newline that does not parse (a process was killed, or is writing now) is left out. Any other
    line that is not a record raises `InputError` with its number; so does a missing file.
    """
    return list(iterate_records(path))


def iterate_records(path: str | Path) -> Iterator[dict[str, Any]]:
    """As `read_records`, one after another: those of a long run do not fit into memory at once."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a run directory that contains {RECORDS}")
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            record = _parse(line)
            if record is not None:
                yield record
            elif line.strip() and line.endswith(b"\n"):
                raise InputError(f"{path}, line {number}: not a metrics record; repair or delete this line")


def curves(path: str | Path, kind: str = "evaluation") -> dict[str, list[float | None]]:
    """The numbers of a `metrics.jsonl` as a table: `step` and every number by its name, as `pandas.DataFrame` takes it.

    Args:
        path: the file, `RunDirectory.records`.
        kind: of the records, one of `KINDS`; each is a row.

    Returns:
        Columns of one length. Numbers in nested objects are named `outer/inner`; None where a record has none.

    Raises:
        InputError: as `read_records`.
    """
    rows = [
        {"/".join(path): value for path, value in _leaves(record) if type(value) in (int, float)}
        for record in iterate_records(path)
        if record["kind"] == kind
    ]
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def last_records(path: str | Path, size: int = 1 << 16) -> list[dict[str, Any]]:
    """The records in the last `size` bytes of a `metrics.jsonl` that may be growing; [] when there is no file."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - size))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return []
    return [record for record in map(_parse, lines) if record is not None]


def _parse(line: bytes) -> dict[str, Any] | None:
    """The record on a line, or None when the line is not one."""
    try:
        record = json.loads(line)
    except ValueError:  # includes UnicodeDecodeError and JSONDecodeError
        return None
    if not isinstance(record, dict) or record.get("kind") not in KINDS or type(record.get("step")) is not int:
        return None
    return record


def _plain(value: Any) -> Any:
    """`value` as JSON types: tensors and arrays become numbers or lists, numbers that JSON lacks become None."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # NumPy and torch, scalars included
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _leaves(values: dict[str, Any], outer: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """What nested dictionaries hold, with the names on the way there."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*outer, str(name)))
        else:
            yield (*outer, str(name)), value


def _tags(kind: str, values: dict[str, Any]) -> Iterator[tuple[str, float | str]]:
    """TensorBoard tags and values: `kind/name` for plain ones; a nested dictionary starts a group of its own name.

    Lists and None have no point in a curve.
    """
    for path, value in _leaves(values):
        tag = "/".join(path if len(path) > 1 else (kind, *path))
        if hasattr(value, "tolist"):
            value = value.tolist()
        if isinstance(value, (bool, int, float)):
            yield tag, float(value)
        elif isinstance(value, str):
            yield tag, value
