"""The command line of `pretrain_mlm.py`. No section of the configuration is imported, so that --help is quick."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

FIELDS = Path(__file__).resolve().parents[1] / "config_help.txt"
"""What `megatron_sas.config.help_text` returns, which also says how to write it."""


def parse_arguments(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """`--config FILE` and `--dry-run`; and the rest, the configuration's overrides.

    `--local_rank` is what the `deepspeed` launcher appends; the environment says the same.
    """
    parser = argparse.ArgumentParser(
        description="Pretrain a BERT masked language model while watching and steering Syntactic Attention Structure. "
        "Start it with deepspeed, torchrun, srun (one task per device) or plain python.",
        epilog=FIELDS.read_text(encoding="utf-8").rstrip("\n"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="FILE.yaml", help="configuration; see examples/")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check environment, configuration, data, disk and memory, make one step, write nothing; exit code 2 when "
        "something is wrong",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_known_args(arguments)
