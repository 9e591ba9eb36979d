"""What the benchmark tools share: which device, what it is called, and fair timing of variants on a busy machine."""

from __future__ import annotations

import gc
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_sas.core.cli import first_line, progress

MOST_QUEUED = 20  # calls in a row


def describe_device(device: torch.device) -> dict[str, Any]:
    """Name, threads and load of the device, and the versions that decide its speed."""
    description: dict[str, Any] = {"type": device.type, "torch": torch.__version__, "python": platform.python_version()}
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        description |= {
            "name": torch.cuda.get_device_name(device), "architecture": f"sm_{major}{minor}", "cuda": torch.version.cuda
        }  # fmt: skip
    else:
        description |= {
            "name": _cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load_average": round(os.getloadavg()[0], 2),
        }
    return description


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    vector = " ".join(f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in fields.get("flags", "").split())
    return f"{fields.get('model name', platform.machine())} ({vector})"


@dataclass
class Times:
    """What one variant took, round by round."""

    wall: list[float] = field(default_factory=list)  # on a GPU by its own clock
    cpu: list[float] = field(default_factory=list)  # seconds of all threads of this process; without waiting for a GPU
    host: list[float] = field(default_factory=list)  # seconds until a call returned, its work only queued; GPUs only

    def add(self, action: Callable[[], object], device: torch.device, queued: int = 0) -> None:
        """Run `action` and record it; with `queued` on a GPU once untimed, then so often in a row, and the means count.

        Waiting for a kernel of 0.1 ms measures how long Python needs to start it. In a queue that does not show,
        unless calls need the host for longer than the GPU: then `host` is as large as `wall`. While the GPU is busy
        with the untimed call, the others are queued; that call also gets its memory back from other variants.
        """
        if device.type == "cuda":
            self._add_queued(action, device, queued)
            return
        wall, cpu = time.perf_counter(), time.process_time()
        action()
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)

    def _add_queued(self, action: Callable[[], object], device: torch.device, queued: int) -> None:
        stream = torch.cuda.current_stream(device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        if queued:
            action()
        calls = max(queued, 1)
        host, cpu = time.perf_counter(), time.process_time()
        begin.record(stream)
        for _ in range(calls):
            action()
        end.record(stream)
        self.host.append((time.perf_counter() - host) / calls)
        self.cpu.append((time.process_time() - cpu) / calls)
        torch.cuda.synchronize(device)
        self.wall.append(begin.elapsed_time(end) / 1000 / calls)


def time_interleaved(
    variants: dict[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    warmup: int = 2,
    queue_seconds: float | None = None,
    left_out: dict[str, str] | None = None,
) -> dict[str, Times]:
    """Seconds of every variant in every round.

    All variants run once in each round, in an order of its own (the same in every run and process), so that a load
    which comes and goes, and what one variant leaves to the next, hit them alike; compare them by the median of the
    ratios within a round (`median_ratio`). On a GPU a turn with `queue_seconds` is one call that is not timed, and then
    as many in a row as take so long, 1 to `MOST_QUEUED` (see `Times.add`). Not for processes that wait for each other.

    A variant that finds no GPU memory is an error, or goes from the result to `left_out` with the reason.
    """
    names = list(variants)
    times = {name: Times() for name in names}
    queued = dict.fromkeys(names, 0 if queue_seconds is None else 1)
    order = random.Random(0)
    for number in progress(range(-warmup, rounds), unit="round", desc="timing"):
        for name in order.sample(names, len(names)):
            if name not in times:
                continue
            try:
                found = times[name] if number >= 0 else Times()
                found.add(variants[name], device, queued[name])
                if number < 0 and queue_seconds is not None:
                    queued[name] = min(max(int(queue_seconds / max(found.wall[-1], 1e-6)), 1), MOST_QUEUED)
                continue
            except torch.OutOfMemoryError as error:
                if left_out is None:
                    raise
                left_out[name] = first_line(error)
            del times[name]
            release_memory(device)  # not before the error is gone, which holds its frames and they their tensors
    return times


def release_memory(device: torch.device) -> None:
    """Give back what nobody holds."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median over rounds of numerator / denominator."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))
