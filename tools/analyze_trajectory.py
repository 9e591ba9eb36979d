"""Compare training runs: onsets, tables, a figure and a self-contained report."""

from __future__ import annotations

import argparse
from pathlib import Path

import _checkout
from megatron_sas.core.cli import InputError, run_main
from megatron_sas.core.files import atomic_directory, check_absent

DESCRIPTION = """\
Find when loss, syntactic attention (UAS) and grammatical ability (BLiMP) break in the course of training, compare
conditions, and answer the five claims of Chen et al. (2024) from the data. Each RUN is a run directory with
metrics.jsonl and config.yaml, or a sweep directory with sweep.json. Runs with the same label are repetitions (seeds) of
one condition; runs with λ = 0 throughout are the base that others are compared with. Where a run holds results of
tools/eval_trajectory.py (trajectory/) or tools/finetune_glue.py (glue/), they are used.

Writes into the output directory (docs/analysis.md explains every rule):
  report.html            everything below on one page that needs no network
  figures/*.png, *.svg   trajectories with onsets, heads and relations, BLiMP by field, λ, stage length, complexity
  table.csv, table.md    final values per condition, mean and standard error over its runs
  differences.csv        every comparison with its test, p and corrected p
  onsets.json            break, intervals and change point of every curve of every run, and which comes first
  claims.json            the five claims with rules, evidence and verdicts"""


def main() -> None:
    arguments = parse_arguments()
    check_absent(arguments.output, arguments.overwrite)
    if arguments.delta is not None and not arguments.delta > 0:
        raise InputError(f"--delta: {arguments.delta:g} is not a positive number of steps")
    if arguments.replicates < 0:
        raise InputError(f"--replicates: {arguments.replicates} is negative; give 0 for no resampling")
    if arguments.seed < 0:
        raise InputError(f"--seed: {arguments.seed} is negative; give 0 or more")
    from megatron_sas.report.analyse import Analysis
    from megatron_sas.report.load import read_inputs, sweep_title
    from megatron_sas.report.report import write_analysis
    from megatron_sas.report.run_onsets import default_delta
    from megatron_sas.report.trajectories import group_by_condition

    runs, notes = read_inputs(arguments.run, arguments.labels)
    group_by_condition(runs)  # reports labels that mix base and regularized runs before any work is done
    delta, title = arguments.delta or default_delta(runs), sweep_title(arguments.run)
    analysis = Analysis(runs, delta, arguments.replicates, arguments.seed, notes, title)
    with atomic_directory(arguments.output, arguments.overwrite) as directory:
        sentences = write_analysis(analysis, directory, arguments.x_scale)
    print("\n".join(sentences))
    print(f"wrote {arguments.output / 'report.html'}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="+", type=Path, metavar="RUN", help="run directory, or sweep directory")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="directory to create")
    parser.add_argument(
        "--labels",
        nargs="+",
        metavar="LABEL",
        help="condition of each RUN, in order (default: the directories' names; sweeps name their own)",
    )
    parser.add_argument(
        "--delta",
        type=float,
        metavar="STEPS",
        help="scale at which bends are measured (default: a tenth of the median run)",
    )
    parser.add_argument(
        "--replicates",
        type=int,
        default=200,
        metavar="N",
        help="resamplings of evaluation items for the intervals of onsets (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the resampling (default: %(default)s)")
    parser.add_argument("--x-scale", choices=("linear", "log"), default="linear", help="steps axis (default: linear)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output directory")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
