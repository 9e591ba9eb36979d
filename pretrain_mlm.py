"""Pretrain a BERT masked language model and watch Syntactic Attention Structure while it learns.

deepspeed pretrain_mlm.py --config examples/toy.yaml --run.output_dir runs/base --sas.schedule 0
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

from megatron_sas.core.streams import keep_printing
from megatron_sas.launch.arguments import parse_arguments
from megatron_sas.launch.slurmstepd import own_slurmstepd
from megatron_sas.run.signals import StopRequest, rank_by_launcher


def main() -> int:
    """Train as the command line says; returns the exit code."""
    keep_printing()
    own_slurmstepd()  # kept for the watchdog
    stop = StopRequest()
    stop.listen()  # before torch and deepspeed are imported, which takes seconds
    try:
        return train(stop)
    except KeyboardInterrupt:
        what = "interrupted" if stop.reason is None else "interrupted twice; nothing was saved"
        print(f"error: rank {rank_by_launcher()}: {what}", file=sys.stderr)
        return 130
    except RuntimeError as error:
        from megatron_sas.core import distributed
        from megatron_sas.core.cli import first_line

        if not distributed.lost_contact(error):
            raise
        time.sleep(1)  # a launcher takes the first that ends for the cause: let that be the other one
        print(
            f"error: rank {distributed.rank()}: lost contact with another process ({first_line(error)}); "
            "started again, the run continues from its newest checkpoint",
            file=sys.stderr,
        )
        return 3


def train(stop: StopRequest) -> int:
    """Parse the arguments and train. `main` wraps this to handle interrupts and lost peers."""
    arguments, overrides = parse_arguments()  # before anything is imported that takes long
    from megatron_sas.config import load_config
    from megatron_sas.core import distributed
    from megatron_sas.core.cli import InputError

    try:
        if arguments.dry_run:
            stop.no_longer_listen()  # there is nothing to save
            from megatron_sas.train.dry_run import preflight

            return preflight(arguments.config, overrides)
        config = load_config(arguments.config, overrides, print if rank_by_launcher() == 0 else lambda line: None)
        from megatron_sas.train.trainer import Trainer  # deepspeed: not needed for --help and bad configurations

        trainer = Trainer(config, stop)
    except (InputError, OSError) as error:  # on every rank, or on some
        report_fault(error, stop)
        return 2
    try:
        trainer.run()
    except (InputError, OSError) as error:  # such as unreadable data or a full disk, maybe on one rank only
        print(f"error: rank {distributed.rank()}: {error}", file=sys.stderr)
        return 2
    distributed.shutdown()
    return 0


def report_fault(error: Exception, stop: StopRequest, sleep: Callable[[float], None] = time.sleep) -> None:
    """Print why this process cannot begin; one line in all where every rank fails alike."""
    rank = rank_by_launcher()
    if rank == 0:
        print(f"error: {error}", file=sys.stderr)
        return
    from megatron_sas.core.cli import CommonError

    asked = stop.reason
    sleep(2)  # a launcher that sees a process end stops the others: let rank 0 print first
    if not isinstance(error, CommonError) and stop.reason == asked:  # otherwise another has printed and ended
        print(f"error: rank {rank}: {error}", file=sys.stderr)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Libraries have threads of their own; taking them down with the interpreter aborts the process now and then.
    os._exit(code)
