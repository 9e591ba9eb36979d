"""What a run is doing, or how it ended, as its directory shows to a process of any host that sees it.

Nothing in it is locked or written. On the host where a run is, its process tells whether it goes on; on others, whether
the directory has shown a sign of life within `run.timeout_minutes`, after which a run without progress ends itself. Of
`metrics.jsonl` only the end is read.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from megatron_sas.core.cli import InputError
from megatron_sas.core.directory_lock import LOCK, Holder, read_holder
from megatron_sas.core.manifest import MANIFEST, read_manifest
from megatron_sas.core.yaml_file import FAST_LOADER, read_yaml
from megatron_sas.run.directory import CONFIG, RunDirectory, RunSection, step_of
from megatron_sas.run.records import last_records
from megatron_sas.run.starts import last_start

STATES = {
    "lost": "no sign of life for longer than run.timeout_minutes, though nothing says that it has ended",
    "failed": "its process on this host is gone, and it did not end in order",
    "unknown": "its configuration or records cannot be read",
    "waiting": "it ended before its last update, and wants to be started again (file requeue, or a loss)",
    "running": "its process is there, or it has shown a sign of life lately",
    "stopped": "it was asked to save and end, by a file stop or Ctrl-C",
    "finished": "it has made its last update",
}
"""The states of a run and what they mean, the most urgent first."""

IN_QUEUE = 24 * 3600.0  # seconds after which somebody should look whether a job is still queued
TAILS = (1 << 16, 1 << 22)  # bytes from the end of the records; the second where an evaluation fills the first
WEIGHT = "_weight"  # ends the names of λ in a record of an update
LOSS = re.compile(r"(\S+) (\d+) \S+ (?:node=(\S+) |- )?(.+)")  # job, update, kind, suspect if any, words


@dataclass(frozen=True)
class Activity:
    """What a run is doing, or how it ended."""

    state: str  # one of STATES
    reason: str | None = None  # in a few words
    needs_somebody: bool = False  # it will not go on, or is not what it should be, unless somebody does something


class Loss(NamedTuple):
    """Why a job started again: a line of `RUN/losses`, which the batch scripts write."""

    job: str
    step: int  # the newest update
    node: str | None  # that is suspected
    words: str


@dataclass(frozen=True)
class RunStatus:
    """A run as it stands. None: not known, or there is none."""

    path: Path
    activity: Activity
    host: str | None = None  # of the newest start's first process
    process: int | None = None
    slurm_job: str | None = None
    step: int | None = None  # updates on record
    steps: int | None = None  # in all
    loss: float | None = None
    weights: dict[str, float] = field(default_factory=dict)  # λ by term
    tokens_per_second: float | None = None
    checkpoint: int | None = None  # updates before the newest whole one
    checkpoint_seconds: float | None = None  # its age
    silent_seconds: float | None = None  # since the last sign of life
    losses: int = 0  # after which a batch script had its job start again

    def values(self) -> dict[str, Any]:
        """As JSON values, under the names of the fields."""
        values = vars(self) | {"path": str(self.path)}
        return {"path": values.pop("path"), **vars(values.pop("activity")), **values}


def read_status(run: RunDirectory, now: float | None = None, this_host: str | None = None) -> RunStatus:
    """How a run stands at the time `now` (unix seconds; default: the clock), seen from `this_host` (default: this one).

    Raises:
        InputError: its configuration cannot be read, or is none.
    """
    now, this_host = now or time.time(), this_host or socket.gethostname()
    steps, timeout = _read_config(run)
    records, holder = _tail(run.records), read_holder(run.path)
    start, silent = last_start(run), max(0.0, now - max(_signs_of_life(run), default=now))
    if holder is not None and (holder.process, holder.host) != (start.get("process"), start.get("host")):
        start = {}  # of an earlier one: this has not got so far, or records less
    where = (start.get("host"), start.get("process")) if holder is None else (holder.host, holder.process)
    limit = timeout + _longest_pause(records)
    activity = _activity(run, records, holder, start.get("slurm_job"), now, limit, silent, this_host)
    newest, whole = _checkpoints(run)
    losses = _losses(run)
    if losses and activity.state in ("running", "lost", "failed"):
        activity = _after_losses(run, losses, activity, now)
    fault = _fault(records, newest, whole)
    if fault is None and losses and activity.state in ("running", "waiting"):
        fault = _suspicion(losses, start.get("slurm_job", losses[-1].job))
    if fault and not activity.needs_somebody:
        activity = Activity(activity.state, fault, needs_somebody=True)
    updates = [record for record in reversed(records) if record["kind"] == "train"]
    last = updates[0] if updates else {}
    return RunStatus(
        run.path,
        activity,
        *where,
        start.get("slurm_job"),
        records[-1]["step"] if records else None,
        steps,
        last.get("loss"),
        {name.removesuffix(WEIGHT): value for name, value in last.items() if name.endswith(WEIGHT)},
        next((update["tokens_per_second"] for update in updates if "tokens_per_second" in update), None),
        None if whole is None else step_of(whole),
        None if whole is None else max(0.0, now - (whole / MANIFEST).stat().st_mtime),
        silent,
        len(losses),
    )


def unreadable(run: RunDirectory, reason: str) -> RunStatus:
    """The status of a run that cannot be read."""
    return RunStatus(run.path, Activity("unknown", reason, needs_somebody=True))


def _read_config(run: RunDirectory) -> tuple[int, float]:
    """Updates in all, and the seconds after which a run without progress ends itself."""
    config = read_yaml(run.config, FAST_LOADER)
    train, own = (config.get(name) if isinstance(config.get(name), dict) else {} for name in ("train", "run"))
    steps, minutes = train.get("steps"), own.get("timeout_minutes", RunSection.model_fields["timeout_minutes"].default)
    if type(steps) is not int or type(minutes) not in (int, float):
        raise InputError(
            f"{run.config}: train.steps or run.timeout_minutes is not a number; restore it, every checkpoint has a copy"
        )
    return steps, 60.0 * minutes


def _tail(path: Path) -> list[dict[str, Any]]:
    """The newest records, with at least one of an update where there is one."""
    records: list[dict[str, Any]] = []
    for size in TAILS:
        records = last_records(path, size)
        if any(record["kind"] == "train" for record in records) or not path.is_file() or path.stat().st_size <= size:
            break
    return records


def _signs_of_life(run: RunDirectory) -> Iterator[float]:
    """When a run last wrote its records, began or published something to be kept, or started (unix seconds)."""
    written = (run.config, run.records, run.checkpoints, run.snapshots, run.ring, run.starts, run.path / LOCK)
    for path in written:
        with contextlib.suppress(FileNotFoundError):
            yield path.stat().st_mtime


def _longest_pause(records: Sequence[Mapping[str, Any]]) -> float:
    """Seconds that the newest records of a start are at most apart: those of several updates are written together."""
    times: list[float] = []
    for record in records:
        if record.get("event") == "start":
            times.clear()
        if type(record.get("time")) in (int, float):
            times.append(record["time"])
    return max((after - before for before, after in pairwise(times)), default=0.0)


def _activity(
    run: RunDirectory,
    records: Sequence[Mapping[str, Any]],
    holder: Holder | None,
    job: str | None,
    now: float,
    limit: float,
    silent: float,
    this_host: str,
) -> Activity:
    here = holder is not None and holder.host == this_host
    alive, speaks = here and holder.is_alive, silent <= limit
    if alive or (speaks and holder is not None and not here):
        return _running(run, records, holder, silent, limit)
    events = (record for record in reversed(records) if record.get("event") in ("start", "stopped", "finished"))
    end = next(events, {})
    if end.get("event") == "finished":
        return Activity("finished")
    if end.get("event") == "stopped":
        return _stopped(run, str(end.get("reason")), job, now, limit)
    if here:
        return Activity("failed", f"process {holder.process} was killed or failed; its output says more", True)
    return _running(run, records, holder, silent, limit)


def _running(
    run: RunDirectory, records: Sequence[Mapping[str, Any]], holder: Holder | None, silent: float, limit: float
) -> Activity:
    """The activity of a run that has not ended, as far as its directory says."""
    if silent > limit:
        who = "whoever made it" if holder is None else f"process {holder.process} on {holder.host}"
        return Activity("lost", f"nothing from {who} for {age(silent)}", True)
    return Activity("running", "asked to save and end" if run.stop.exists() else None)


def _stopped(run: RunDirectory, reason: str, job: str | None, now: float, limit: float) -> Activity:
    """The activity of a run that saved and ended before its last update, for that reason."""
    if reason.startswith("file ") or reason == "SIGINT":
        return Activity("stopped", f"by {'Ctrl-C' if reason == 'SIGINT' else 'a file stop'}")
    with contextlib.suppress(FileNotFoundError):
        waits = now - run.requeue.stat().st_mtime
        if job is None:
            return Activity("waiting", f"stopped by {reason}, and no job starts it again", True)
        if waits > IN_QUEUE:
            return Activity("waiting", f"for {age(waits)} since {reason}; is job {job} still in the queue?", True)
        return Activity("waiting", f"for job {job}, since {reason}")
    # A batch script has removed the mark, and starts the processes now; or did, and they did not get far.
    failed = now - run.path.stat().st_mtime > limit
    fault = f"stopped by {reason}; it was started again and did not get far"
    return Activity("waiting", fault if failed else "is being started again", failed)


def _checkpoints(run: RunDirectory) -> tuple[Path | None, Path | None]:
    """The newest checkpoint, and the newest with all of its files in the size that they had."""
    names = os.listdir(run.checkpoints) if run.checkpoints.is_dir() else []
    steps = sorted((step for name in names if (step := step_of(name)) is not None), reverse=True)
    paths = [run.checkpoint(step) for step in steps]
    return next(iter(paths), None), next(filter(_is_whole, paths), None)


def _is_whole(checkpoint: Path) -> bool:
    try:
        files = read_manifest(checkpoint)["files"]
        return all((checkpoint / name).stat().st_size == entry["size"] for name, entry in files.items())
    except (InputError, OSError):
        return False


def _fault(records: Sequence[Mapping[str, Any]], newest: Path | None, whole: Path | None) -> str | None:
    """What is wrong with a run whatever it does."""
    if newest != whole:
        return f"checkpoint {newest.name} is not whole"
    update = next((record for record in reversed(records) if record["kind"] == "train"), None)
    if update is not None and None in (update.get("loss", 0), update.get("grad_norm", 0)):
        return f"loss or gradient of update {update['step']} is not finite"
    return None


def _losses(run: RunDirectory) -> list[Loss]:
    with contextlib.suppress(OSError):
        lines = map(LOSS.fullmatch, run.losses.read_text(encoding="utf-8", errors="replace").splitlines())
        found = (line.groups() for line in lines if line)
        return [Loss(job, int(step), node, words) for job, step, node, words in found]
    return []


def _after_losses(run: RunDirectory, losses: Sequence[Loss], activity: Activity, now: float) -> Activity:
    """The activity of a run of which jobs have lost something; after the newest loss it waits for its next start."""
    job, step, _, words = losses[-1]
    since = run.losses.stat().st_mtime
    waits = max(0.0, now - since)
    newer = not run.starts.exists() or since >= run.starts.stat().st_mtime
    if newer and waits <= IN_QUEUE:
        return Activity("waiting", f"for job {job}, which starts again after: {words}")
    if newer:
        return Activity("waiting", f"for {age(waits)} since: {words}; is job {job} still in the queue?", True)
    if activity.state == "running":
        return activity
    return Activity(activity.state, f"{activity.reason}; the last loss before, at update {step}: {words}", True)


def _suspicion(losses: Sequence[Loss], job: str | None) -> str | None:
    """Which node was suspected more than once in this job, if any."""
    nodes = [loss.node for loss in losses if loss.job == job]
    for node, count in Counter(filter(None, nodes)).most_common(1):
        if count > 1:
            suspected = f"node {node} is suspected of {count} of {len(nodes)} losses of job {job}"
            return f"{suspected}; look at it; the start of another job (sbatch --exclude={node}) clears this"
    return None


def age(seconds: float) -> str:
    """A time as 12s, 12m, 12h or 12d, rounded down."""
    for unit, length, end in (("s", 1, 60), ("m", 60, 3600), ("h", 3600, 48 * 3600)):
        if seconds < end:
            return f"{int(seconds // length)}{unit}"
    return f"{int(seconds // 86400)}d"


def config_fault(error: InputError | OSError) -> str:
    """Why a run cannot be read, in a few words for a table."""
    return f"{CONFIG} cannot be read" if isinstance(error, InputError) else f"{error.filename}: {error.strerror}"
