"""Dry runs for the fork server."""

from __future__ import annotations

import sys

import torch

import pretrain_mlm
from megatron_sas.core import distributed
from megatron_sas.train import build
from megatron_sas.train.dry_run import preflight


def as_configured() -> int:
    """`pretrain_mlm.py --dry-run`."""
    sys.argv.append("--dry-run")
    return pretrain_mlm.main()


def out_of_memory_on_rank_1() -> int:
    """Rank 1 finds no memory while the run is built."""

    def build_state(*arguments: object) -> build.RunState:
        if distributed.rank() == 1:
            raise torch.OutOfMemoryError("Out of memory. Tried")
        return build.build_state(*arguments)

    return preflight(sys.argv[2], sys.argv[3:], build_state)
