#!/usr/bin/env python3
"""Everything that can be measured offline, on all models of a run or of a folder, one point a model."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import _checkout
from megatron_sas.core.cli import InputError, progress, run_main
from megatron_sas.core.device import DEVICE_HELP
from megatron_sas.data.unknown import Unknown
from megatron_sas.evaluation.blimp_labels import METRICS
from megatron_sas.trajectory.step_names import STEP_PATTERN_HELP

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from megatron_sas.trajectory.measure import Inputs

DESCRIPTION = """\
Measure every snapshot and checkpoint of a run (those of the runs that it branched from, up to the branch, included), or
every model in a folder of Hugging Face directories. Exports record their step; of other models it is the number in
which the names differ (seed_0-step_20k). Stages (OLMo, Ettin) count on from one another.

  --treebank  UAS overall, by relation and by head; attention entropy; SAS by the regularizer's own measure
  --blimp     minimal pairs by set, term and field
  --text      packed held-out data: TwoNN intrinsic dimension of the [CLS] vectors, masked-LM loss, SAS on its edges
  always      the norm of the weights

Each model is one directory points/step_N in the output, written as a whole: started again, the command measures what is
missing. Every edge and pair that was right is in items.npz there. At the end heads.json says which head serves which
relation and since when, and summary.csv has a line a model. docs/trajectories.md explains the files.

Settings of further evaluations, in the section `evaluation` of pretrain_mlm.py --help, are flags here: --NAME VALUE."""

SETTINGS = ("treebank", "treebank_sentences", "blimp", "blimp_pairs_per_set", "blimp_metric")
"""Fields of the section `evaluation` that flags below set."""


def main() -> None:
    arguments = parse_arguments()
    check_numbers(arguments)
    from megatron_sas.trajectory.models import list_models
    from megatron_sas.trajectory.points import TRAJECTORY, read_points
    from megatron_sas.trajectory.workers import measure_models, measuring_pool

    if len(arguments.models) > 1 and arguments.output is not None:
        raise InputError("--output: is for one run or folder; leave it out, and each gets its own")
    inputs, tasks = inputs_of(arguments), {}
    models = {path: models_of(path, arguments, list_models) for path in arguments.models}
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(progress(total=sum(map(len, models.values())), unit="model", desc="trajectory"))
        workers = min(arguments.workers, max(map(len, models.values())))
        pool = stack.enter_context(measuring_pool(workers)) if workers > 1 else None

        def report(line: str) -> None:
            bar.clear()
            print(line, file=sys.stderr)

        for path, of_path in models.items():
            output = arguments.output or path / TRAJECTORY
            left_out = measure_models(
                path,
                of_path,
                inputs,
                output,
                tasks=tasks,
                pool=pool,
                device=arguments.device,
                on_error=arguments.on_error,
                report=report,
                after_model=bar.update,
            )
            bar.clear()
            for line in unknown_lines(next(reversed(read_points(output)), {})):
                print(line)
            print(f"{output}: {len(of_path) - left_out} models measured, {left_out} skipped")


def models_of(path: Path, arguments: argparse.Namespace, list_models: Callable) -> list[tuple[int, Path]]:
    """The models of a run or folder that are wanted."""
    models = list_models(path, arguments.step_pattern, lambda line: print(line, file=sys.stderr))
    if arguments.steps:
        models = [(step, model) for step, model in models if any(low <= step <= high for low, high in arguments.steps)]
        if not models:
            raise InputError(f"--steps: none of the models in {path} has such a step")
    return models


def unknown_lines(point: dict) -> list[str]:
    """How much of each input the tokenizer does not know: the same in all points, absent from those of old versions."""
    from megatron_sas.evaluation.registry import EVALUATIONS

    records = {
        f"--{evaluation.input}": point.get(evaluation.metrics[0].point[0], {}).get("unknown")
        for evaluation in EVALUATIONS.values()
        if evaluation.items is not None
    }
    records["--text"] = point.get("text_unknown")
    return [Unknown.from_record(record).line(name) for name, record in records.items() if record is not None]


def check_numbers(arguments: argparse.Namespace) -> None:
    """Refuse numbers out of range."""
    least = {"workers": 1, "batch_tokens": 1, "treebank_sentences": 1, "pairs_per_set": 1, "text_sequences": 10}
    for name, low in least.items():
        value = getattr(arguments, {"pairs_per_set": "blimp_pairs_per_set"}.get(name, name))
        if value is not None and value < low:
            raise InputError(f"--{name.replace('_', '-')}: {value} is below {low}")


def inputs_of(arguments: argparse.Namespace) -> Inputs:
    """What to measure on; refuses to measure on nothing."""
    from megatron_sas.evaluation.base import TEXT
    from megatron_sas.evaluation.registry import EVALUATIONS
    from megatron_sas.trajectory.measure import Inputs

    inputs = Inputs.of(
        text=arguments.text,
        text_sequences=arguments.text_sequences,
        precision=arguments.precision,
        batch_tokens=arguments.batch_tokens,
        **{name: getattr(arguments, name) for name in SETTINGS},
        **{name: getattr(arguments, name, info.default) for name, info in further_settings().items()},
    )
    if inputs.text is None and not any(e.wanted(inputs) for e in EVALUATIONS.values() if e.input != TEXT):
        raise InputError("nothing to measure on; give --treebank, --blimp or --text")
    return inputs


def further_settings() -> dict[str, FieldInfo]:
    """Settings of evaluations that no other flag stands for, by name."""
    from megatron_sas.evaluation.registry import EVALUATIONS

    known = {*SETTINGS, "validation_sequences", "complexity_sequences"}
    fields = [item for e in EVALUATIONS.values() for item in e.settings.model_fields.items()]
    return {name: info for name, info in fields if name not in known}


def steps(text: str) -> tuple[int, int]:
    """`N` or `FIRST-LAST`."""
    first, dash, last = text.partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a step nor FIRST-LAST")
    return int(first), int(last or first)


def parse_arguments() -> argparse.Namespace:
    """The command line; the evaluations are imported only to look for an unknown argument among their settings."""
    arguments, unknown = make_parser({}).parse_known_args()
    return make_parser(further_settings()).parse_args() if unknown else arguments


def make_parser(further: dict[str, FieldInfo]) -> argparse.ArgumentParser:
    """With a flag for each of the `further` settings."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    text = "a run, or a folder of model directories; several in one call share what is prepared"
    parser.add_argument("models", type=Path, nargs="+", metavar="RUN_OR_FOLDER", help=text)
    parser.add_argument("--treebank", metavar="FILE", help="as for tools/eval_syntax.py")
    parser.add_argument("--treebank-sentences", type=int, metavar="N", help="only the first N sentences (all)")
    parser.add_argument("--blimp", metavar="DIR", help="as for tools/eval_blimp.py")
    parser.add_argument(
        "--pairs-per-set",
        dest="blimp_pairs_per_set",
        type=int,
        metavar="N",
        help="only the first N pairs of each set (all)",
    )
    parser.add_argument(
        "--metric",
        dest="blimp_metric",
        choices=METRICS,
        default=METRICS[0],
        help="as for tools/eval_blimp.py (pll)",
    )
    parser.add_argument("--text", metavar="PREFIX", help="packed data, made with the models' tokenizer")
    parser.add_argument(
        "--text-sequences", type=int, default=1000, metavar="N", help="only the first N sequences (1000)"
    )
    for name, info in further.items():
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="VALUE", default=info.default, help=info.description)
    parser.add_argument("--output", type=Path, metavar="DIR", help="where to write (RUN_OR_FOLDER/trajectory)")
    parser.add_argument(
        "--steps", nargs="+", type=steps, metavar="N|FIRST-LAST", help="only models of these steps (all)"
    )
    parser.add_argument("--step-pattern", metavar="REGEX", help=STEP_PATTERN_HELP)
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="models measured at once, a process each (1)"
    )
    parser.add_argument(
        "--on-error",
        choices=("refuse", "skip"),
        default="refuse",
        help="at a model that cannot be read, or differs from the others: stop, or pass over it with one line (refuse)",
    )
    parser.add_argument("--batch-tokens", type=int, default=4096, metavar="N", help="tokens a batch (4096)")
    parser.add_argument("--device", help=DEVICE_HELP)
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="as for tools/eval_syntax.py (fp32)"
    )
    return parser


if __name__ == "__main__":
    run_main(main)
