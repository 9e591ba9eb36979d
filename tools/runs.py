"""List the runs in and below directories: what they do, how far they are, and which need somebody."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import _checkout
from megatron_sas.core.cli import InputError, run_main

DESCRIPTION = """\
List the runs in and below directories of a shared file system, from any host and without disturbing them: what each
does, how far it is, its loss and λ, when it last saved and last showed a sign of life, and which need somebody, with
the reason. Those come first. Only files are read; of Slurm, the job that the newest start has recorded is shown.
docs/clusters.md explains the states."""

EPILOG = """\
columns: STATE; RUN, from DIR on if one is given; UPDATE, made and in all; LOSS; λ of the terms; TOK/S, tokens per
second; SAVED, newest whole checkpoint and its age; LOST, losses after which a batch script had its job start again;
SEEN, age of the last sign of life; JOB/HOST, the Slurm job or else the host. Terminals of 120 columns and more see
numbers in full, and host:process. --json has all of it, exactly.

exit code: 0; with --needs 1 if any run needs somebody; 2 if something could not be read"""


def main() -> int:
    arguments = parse_arguments()
    from megatron_sas.core.files import finite
    from megatron_sas.run.listing import find_runs, read_statuses, summary, table

    faults: list[str] = []
    runs = find_runs(arguments.directories, faults)
    statuses = read_statuses(runs, faults)
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    if not statuses:
        where = ", ".join(map(str, arguments.directories))
        raise InputError(f"{where}: no run in or below it; a run has config.yaml and metrics.jsonl")
    total, needing = summary(statuses), [status for status in statuses if status.activity.needs_somebody]
    shown = needing if arguments.needs else statuses
    if arguments.json:
        print(json.dumps([finite(status.values()) for status in shown], indent=2, ensure_ascii=False))
    else:
        names = [name_of(status.path, arguments.directories) for status in shown]
        lines = table(shown, names, max(80, shutil.get_terminal_size().columns)) if shown else []
        print("\n".join([*lines, total]))
    if faults:
        return 2
    return int(arguments.needs and bool(needing))


def name_of(path: Path, directories: list[Path]) -> str:
    """What a run is called: its path, from the directory on if there is only one."""
    if len(directories) == 1 and path != directories[0]:
        return str(path.relative_to(directories[0]))
    return str(path)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="a run, or a directory with runs")
    parser.add_argument("--needs", action="store_true", help="list only the runs that need somebody")
    parser.add_argument("--json", action="store_true", help="print a list of objects instead of a table")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
