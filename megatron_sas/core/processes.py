"""Worker processes of the command-line programs."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import Any

from megatron_sas.core.cli import InputError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def keep_freed_memory() -> None:
    """Have glibc keep up to 1 GiB of freed memory for what is allocated next, unless MALLOC_… variables decide.

    By default it gives blocks of megabytes back to the system, which clears every page of them when the next tensor
    needs it: 5 to 10 % of a forward pass or a parse, a fifth of a step of a small model with a large vocabulary.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    with contextlib.suppress(AttributeError, OSError):  # another C library
        for option, value in ((M_TRIM_THRESHOLD, 2**30), (M_MMAP_THRESHOLD, 2**25)):  # the most it takes
            ctypes.CDLL(None).mallopt(option, value)


@contextlib.contextmanager
def worker_pool(
    workers: int, on_interrupt: signal.Handlers, start: Callable[..., object] | None = None, *arguments: Any
) -> Iterator[ProcessPoolExecutor]:
    """New processes, which end with this one. What is under way at the end of the block is finished, the rest dropped.

    Args:
        on_interrupt: what a worker does at Ctrl-C: `SIG_DFL` ends it at once, without a traceback; `SIG_IGN` leaves it
            to this process to stop the workers.
        start: runs once in every worker, with `arguments`.

    Raises:
        InputError: a worker has died.
    """
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (on_interrupt, start, arguments))
    try:
        yield pool
    except BrokenProcessPool:
        raise InputError(
            f"a worker process ended unexpectedly, probably for want of memory; try fewer than --workers {workers}"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(on_interrupt: signal.Handlers, start: Callable[..., object] | None, arguments: tuple) -> None:
    signal.signal(signal.SIGINT, on_interrupt)
    end_with_parent()
    if start is not None:
        start(*arguments)


def end_with_parent() -> None:
    """Have this process end when the one that started it does: a worker whose parent was killed waits indefinitely."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent_process().join()
    os._exit(1)
