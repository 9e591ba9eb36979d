"""Many runs at once: found below directories, read side by side, shown as a table, those that need somebody first."""

from __future__ import annotations

import os
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_sas.core.cli import InputError
from megatron_sas.run.directory import RunDirectory, is_model_with, is_run_with
from megatron_sas.run.status import STATES, RunStatus, age, config_fault, read_status, unreadable

READERS = 8  # threads, since a shared file system answers late
WIDE = 120  # columns from which on the table has numbers in full, and hosts as well as jobs
NARROWEST = 8  # columns of the names; longer ones have a line of their own where there is no more


def find_runs(directories: Sequence[Path], faults: list[str]) -> list[RunDirectory]:
    """The runs in and below `directories`, each once; directories that cannot be read are added to `faults`.

    Hidden directories and what lies in runs and models is left out; a link counts if it leads to a run.

    Raises:
        InputError: one of them is no directory.
    """
    found: dict[Path, RunDirectory] = {}
    for directory in directories:
        if not directory.is_dir():
            raise InputError(f"{directory}: no such directory; give one with runs in or below it")
        for run in _below(directory, faults):
            found.setdefault(run.path.resolve(), run)
    return list(found.values())


def _below(directory: Path, faults: list[str]) -> Iterator[RunDirectory]:
    pending = [directory]
    while pending:
        here = pending.pop()
        try:
            entries = {entry.name: entry for entry in os.scandir(here)}
            if is_run_with(entries):
                yield RunDirectory(here)
            elif not is_model_with(entries):
                inner = [entry for name, entry in entries.items() if not name.startswith(".") and entry.is_dir()]
                links = [Path(entry.path) for entry in inner if entry.is_symlink()]
                yield from (RunDirectory(link) for link in links if is_run_with(os.listdir(link)))
                pending += [Path(entry.path) for entry in inner if not entry.is_symlink()]
        except OSError as error:
            faults.append(f"{error.filename or here}: {error.strerror}; what lies below it is not in the list")


def read_statuses(runs: Sequence[RunDirectory], faults: list[str]) -> list[RunStatus]:
    """How the runs stand, those that need somebody first, then by state and path; what cannot be read adds to `faults`.

    A run that is removed meanwhile is left out.
    """
    with ThreadPoolExecutor(READERS) as pool:
        statuses = [status for status in pool.map(lambda run: _read(run, faults), runs) if status is not None]
    order = list(STATES)
    return sorted(statuses, key=lambda s: (not s.activity.needs_somebody, order.index(s.activity.state), s.path))


def _read(run: RunDirectory, faults: list[str]) -> RunStatus | None:
    try:
        return read_status(run)
    except (InputError, OSError) as error:
        if not run.config.exists():
            return None
        faults.append(f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error))
        return unreadable(run, config_fault(error))


def table(statuses: Sequence[RunStatus], names: Sequence[str], width: int) -> list[str]:
    """Lines of at most `width` columns (80 or more): a row for each run, called by its name, and below it the reason.

    Columns in which nothing is known of any run are left out.
    """
    for wide in (True, False) if width >= WIDE else (False,):
        gap, columns = "  " if wide else " ", _columns(statuses, wide)
        widths = {title: max(map(len, (title, *cells))) for title, cells in columns.items()}
        room = width - sum(widths.values()) - len(gap) * len(widths)
        if room >= NARROWEST:
            break
    own = max(NARROWEST, min(room, max(map(len, names), default=0)))
    state, *others = columns

    def row(name: str, cells: Sequence[str]) -> list[str]:
        first, *rest = cells
        line = gap.join(f"{cell:>{widths[title]}}" for title, cell in zip(others, rest, strict=True))
        begin = f"{first:{widths[state]}}{gap}"
        if len(name) > own:
            return [f"{begin}{name}", f"{'':{len(begin) + own}}{gap}{line}".rstrip()]
        return [f"{begin}{name:{own}}{gap}{line}".rstrip()]

    lines = row("RUN", list(columns))
    for status, name, *cells in zip(statuses, names, *columns.values(), strict=True):
        lines += row(name, cells)
        if status.activity.reason is not None:
            mark = "! " if status.activity.needs_somebody else "  "
            lines += textwrap.wrap(status.activity.reason, width, initial_indent=f"  {mark}", subsequent_indent=" " * 4)
    return lines


def _columns(statuses: Sequence[RunStatus], wide: bool) -> dict[str, list[str]]:
    """The cells of each column but the name's, by title, without columns that would be empty."""
    number = (lambda value: "" if value is None else f"{value:,.0f}") if wide else short
    terms = {name for status in statuses for name, value in status.weights.items() if value}

    def of(what: str) -> list:
        return [getattr(status, what) for status in statuses]

    def progress(status: RunStatus) -> str:
        return "" if status.steps is None else f"{number(status.step or 0)}/{number(status.steps)}"

    def weights(status: RunStatus) -> str:
        shown = status.weights.items()
        if len(terms) > 1:
            text = " ".join(f"{name} {value:.3g}" for name, value in shown if value) or ("0" if shown else "")
        else:
            text = next((f"{value:.3g}" for name, value in shown if name in terms), "0" if shown else "")
        return text if wide else _cut(text, 9)

    def checkpoint(status: RunStatus) -> str:
        return "" if status.checkpoint is None else f"{number(status.checkpoint)} {age(status.checkpoint_seconds)}"

    columns = {
        "STATE": [status.activity.state for status in statuses],
        "UPDATE": list(map(progress, statuses)),
        "LOSS": ["" if loss is None else f"{loss:.3f}"[:6] for loss in of("loss")],
        "λ": list(map(weights, statuses)),
        "TOK/S": list(map(number, of("tokens_per_second"))),
        "SAVED": list(map(checkpoint, statuses)),
        "LOST": [str(count or "") for count in of("losses")],
        "SEEN": ["" if silent is None else age(silent) for silent in of("silent_seconds")],
    }
    hosts = ["" if host is None else host.partition(".")[0] for host in of("host")]
    if wide:
        columns["WHERE"] = [
            f"{host}:{process}" if host else "" for host, process in zip(hosts, of("process"), strict=True)
        ]
        columns["JOB"] = [job or "" for job in of("slurm_job")]
    else:
        columns["JOB/HOST"] = [_cut(job or host, 10) for job, host in zip(of("slurm_job"), hosts, strict=True)]
    return {title: cells for title, cells in columns.items() if any(cells)}


def short(value: float | None) -> str:
    """A count of at most five characters: 9999, 45.2k, 1.25M; nothing for None."""
    if value is None:
        return ""
    if value < 9999.5:
        return f"{value:.0f}"
    for unit in "kMG":
        value /= 1000
        if float(f"{value:.3g}") < 1000:
            return f"{value:.3g}{unit}"
    return f"{value / 1000:.3g}T"


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def summary(statuses: Sequence[RunStatus]) -> str:
    """How many runs there are of each state, and how many need somebody."""
    counts = Counter(status.activity.state for status in statuses)
    states = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    needing = sum(status.activity.needs_somebody for status in statuses)
    verb = "needs" if needing <= 1 else "need"
    return f"{len(statuses)} run{'s' * (len(statuses) != 1)} ({states}); {needing or 'none'} {verb} somebody"
