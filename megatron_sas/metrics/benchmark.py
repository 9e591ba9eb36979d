"""What the benchmark tools share: which device, what it is called, and fair timing of variants on a busy machine."""

from __future__ import annotations

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

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)  # seconds of all threads of this process

    def add(self, action: Callable[[], object], device: torch.device) -> None:
        """Run `action` and record it, the device's queue included."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        wall, cpu = time.perf_counter(), time.process_time()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)


def time_interleaved(
    variants: dict[str, Callable[[], object]], rounds: int, device: torch.device, warmup: int = 2
) -> dict[str, Times]:
    """Seconds of every variant in every round.

    All variants run once in each round, in an order that rotates, so that a load which comes and goes hits them alike;
    compare them by the median of the ratios within a round (`median_ratio`).
    """
    names = list(variants)
    times = {name: Times() for name in names}
    for number in progress(range(-warmup, rounds), unit="round", desc="timing"):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            (times[name] if number >= 0 else Times()).add(variants[name], device)
    return times


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median over rounds of numerator / denominator."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))
