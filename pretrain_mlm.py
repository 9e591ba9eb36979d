"""Pretrain a BERT masked language model and watch Syntactic Attention Structure while it learns.

deepspeed pretrain_mlm.py --config examples/toy.yaml --run.output_dir runs/base --sas.schedule 0
"""

from __future__ import annotations

import os
import sys

from megatron_sas.cli import InputError
from megatron_sas.config import load_config, parse_arguments


def main() -> int:
    """Train as the command line says; returns the exit code."""
    try:
        arguments, overrides = parse_arguments()
        config = load_config(arguments.config, overrides)
        from megatron_sas.engine.trainer import Trainer  # torch and deepspeed: not needed for --help and bad configs

        Trainer(config).run()
    except InputError as error:
        if os.environ.get("RANK", "0") == "0":  # the same on every rank
            print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.exit(code)
