#!/usr/bin/env python3
"""Training checkpoints to Hugging Face models and back."""

from __future__ import annotations

import argparse
from pathlib import Path

import _checkout
from megatron_sas.core.cli import run_main
from megatron_sas.core.device import DTYPES

DESCRIPTION = """\
to-hf    a training checkpoint becomes a Hugging Face directory of BertForMaskedLM or ModernBertForMaskedLM, as its
         architecture is, that transformers (4 and 5) and minicons load as it is: config.json (with the step, which all
         tools report), model.safetensors, the tokenizer (with vocab.txt for WordPiece) and a README.md that says how
         the model was trained and, if the run's metrics.jsonl is beside the checkpoints, how it was evaluated.
from-hf  such a directory becomes a checkpoint of step 0, which the tools take as --model and from which a
         run starts with `model.init_from: OUT_DIR` (a run can also name the Hugging Face directory itself there). The
         pooler and the next-sentence head, which a masked LM does not use, are left out; a file with anything else that
         would be lost is refused.

to-hf and then from-hf give back the same weights exactly (with --dtype fp32)."""


def main() -> None:
    arguments = parse_arguments()
    from megatron_sas.export.hf import from_hf, to_hf

    if arguments.direction == "to-hf":
        checkpoint = to_hf(arguments.checkpoint, arguments.output, arguments.dtype, arguments.overwrite)
        print(f"wrote {arguments.output} from {checkpoint}")
    else:
        parameters = from_hf(arguments.model, arguments.output, arguments.overwrite)
        print(f"wrote {arguments.output}: a checkpoint of step 0 with {parameters:,} parameters")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="direction", required=True, metavar="{to-hf,from-hf}")
    to = commands.add_parser("to-hf", help="training checkpoint to Hugging Face directory", allow_abbrev=False)
    to.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="a training checkpoint, or a run (its newest checkpoint)"
    )
    to.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="precision of the weights (fp32)")
    back = commands.add_parser("from-hf", help="Hugging Face directory to checkpoint of step 0", allow_abbrev=False)
    back.add_argument(
        "model",
        type=Path,
        metavar="HF_DIR",
        help="directory of a BertForMaskedLM or ModernBertForMaskedLM with its tokenizer",
    )
    for command in (to, back):
        command.add_argument("output", type=Path, metavar="OUT_DIR", help="directory to make")
        command.add_argument("--overwrite", action="store_true", help="replace a model that is at OUT_DIR")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
