"""Ranks and the few collectives the project needs; every function also works in a single process without a group."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_sas.core.cli import CommonError, InputError

Result = TypeVar("Result")


def is_distributed() -> bool:
    """Whether a process group exists."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Global rank of this process; 0 without a process group."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if is_distributed() else 1


def local_rank() -> int:
    """Rank on this host, from `LOCAL_RANK`, which every launcher sets (Slurm's `SLURM_LOCALID` as a fallback)."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))


def local_world_size() -> int:
    """Processes on this host: `LOCAL_WORLD_SIZE`, or `LOCAL_SIZE` as the `deepspeed` launcher has it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def is_main() -> bool:
    """Whether this is global rank 0, the only one that writes shared files."""
    return rank() == 0


def all_reduce_sum_(tensor: torch.Tensor) -> torch.Tensor:
    """Sum `tensor` over all ranks in place and return it (no host synchronisation)."""
    if is_distributed() and world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def broadcast_object(value: Any, source: int = 0) -> Any:
    """Return rank `source`'s picklable `value` on every rank."""
    if not is_distributed() or world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Return the picklable `value` of every rank, in rank order, on every rank."""
    if not is_distributed() or world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def shutdown() -> None:
    """Leave the process group once every rank is here: one that exits while others still use its store aborts them."""
    if is_distributed():
        barrier()
        dist.destroy_process_group()


def lost_contact(error: RuntimeError) -> bool:
    """Whether a collective or the store failed because another process is gone."""
    signs = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL")
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)


def barrier() -> None:
    """Wait for all ranks."""
    if is_distributed() and world_size() > 1:
        dist.barrier()


def on_all_ranks(action: Callable[[], Result]) -> Result:
    """Run `action`, which must not communicate, on every rank; if it fails anywhere, raise the same error everywhere.

    Raises:
        CommonError: with the first rank's message.
    """
    fault, result = None, None
    try:
        result = action()
    except (InputError, OSError) as error:
        fault = str(error)
    fault = next((f for f in gather_objects(fault) if f is not None), None)
    if fault is not None:
        raise CommonError(fault)
    return result
