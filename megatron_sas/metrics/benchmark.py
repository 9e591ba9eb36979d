"""What the benchmark tools share: which device, what it is called, and fair timing of variants on a busy machine."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_sas.cli import progress


def describe_device(device: torch.device) -> dict[str, Any]:
    """Name, threads and load of the device, and the versions that decide its speed."""
    description: dict[str, Any] = {"type": device.type, "torch": torch.__version__, "python": platform.python_version()}
    if device.type == "cuda":
        description |= {"name": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
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
    cpu: list[float] = field(default_factory=list)  # seconds of all threads of this process
    host: list[float] = field(default_factory=list)  # seconds until a call returned, its work only queued; GPUs only

    def add(self, action: Callable[[], object], device: torch.device, queued: int = 1) -> None:
        """Run `action` and record it; on a GPU `queued` times in a row, of which the means count.

        Waiting for a kernel of 0.1 ms measures how long Python needs to start it. In a queue that does not show,
        unless calls need the host for longer than the GPU: then `host` is as large as `wall`.
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
        host, cpu = time.perf_counter(), time.process_time()
        begin.record(stream)
        for _ in range(queued):
            action()
        end.record(stream)
        self.host.append((time.perf_counter() - host) / queued)
        torch.cuda.synchronize(device)
        self.cpu.append((time.process_time() - cpu) / queued)
        self.wall.append(begin.elapsed_time(end) / 1000 / queued)


def time_interleaved(
    variants: dict[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    warmup: int = 2,
    queued: int = 1,
    left_out: dict[str, str] | None = None,
) -> dict[str, Times]:
    """Seconds of every variant in every round; on a GPU of `queued` calls in a row each.

    All variants run once in each round, in an order that rotates, so that a load which comes and goes hits them alike;
    compare them by the median of the ratios within a round (`median_ratio`).

    A variant that finds no GPU memory is an error, or goes from the result to `left_out` with the reason.
    """
    names = list(variants)
    times = {name: Times() for name in names}
    for number in progress(range(-warmup, rounds), unit="round", desc="timing"):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            if name not in times:
                continue
            try:
                (times[name] if number >= 0 else Times()).add(variants[name], device, queued)
                continue
            except torch.OutOfMemoryError as error:
                if left_out is None:
                    raise
                left_out[name] = first_line(error)
            del times[name]
            release_memory(device)  # not before the error is gone, which holds its frames and they their tensors
    return times


def first_line(error: Exception) -> str:
    """An error's message, cut where torch goes on to explain."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def release_memory(device: torch.device) -> None:
    """Give back what nobody holds."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median over rounds of numerator / denominator."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))
