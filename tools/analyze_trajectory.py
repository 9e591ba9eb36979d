"""Compare training runs: onsets, tables, a figure and a self-contained report."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_sas.analysis.findings import default_delta
from megatron_sas.analysis.report import write_analysis
from megatron_sas.analysis.trajectories import conditions, load_runs
from megatron_sas.cli import InputError, run_main
from megatron_sas.files import atomic_directory, refuse_existing

DESCRIPTION = """\
Find when loss, syntactic attention (UAS) and grammatical ability (BLiMP) break in the course of training, and
compare runs. Each RUN is a run directory with metrics.jsonl and config.yaml. Runs with the same label are repetitions
(seeds) of one condition; runs with λ = 0 throughout are the base that others are compared with.

Writes into the output directory:
  report.html            everything below on one page that needs no network
  figure.png, .svg       loss, UAS and BLiMP over steps, all runs, onsets marked
  table.csv, table.md    final values per condition, mean and standard error over its runs
  onsets.json            break and change point of every curve of every run"""


def main() -> None:
    arguments = parse_arguments()
    refuse_existing(arguments.output, arguments.overwrite)
    if arguments.delta is not None and not arguments.delta > 0:
        raise InputError(f"--delta: {arguments.delta:g} is not a positive number of steps")
    runs = load_runs(arguments.run, arguments.labels)
    conditions(runs)  # reports labels that mix base and regularized runs before any work is done
    delta = arguments.delta or default_delta(runs)
    with atomic_directory(arguments.output, arguments.overwrite) as directory:
        sentences = write_analysis(runs, directory, delta, arguments.x_scale)
    print("\n".join(sentences))
    print(f"wrote {arguments.output / 'report.html'}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="+", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="directory to create")
    parser.add_argument(
        "--labels", nargs="+", metavar="LABEL", help="condition of each RUN, in order (default: the directories' names)"
    )
    parser.add_argument(
        "--delta",
        type=float,
        metavar="STEPS",
        help="scale at which bends are measured (default: a tenth of the shortest run)",
    )
    parser.add_argument("--x-scale", choices=("linear", "log"), default="linear", help="steps axis (default: linear)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output directory")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
