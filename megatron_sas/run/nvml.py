"""What the GPU's sensors say, through NVML (`nvidia-ml-py`); nothing where there is no NVIDIA GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch


class GpuMonitor:
    """Reads utilisation, power, temperature and memory of one CUDA device."""

    def __init__(self, index: int | None = None, cuda: Any = torch.cuda) -> None:
        """Watch CUDA device `index` of this process (default: the current one); `cuda` is asked which that is.

        NVML counts all GPUs of the machine in PCI order; CUDA counts those in `CUDA_VISIBLE_DEVICES`, given as indices
        or UUIDs, by default fastest first. So the device is found by the UUID that CUDA itself reports, never by index.
        """
        self.active = False  # whether there is a device to read
        if not cuda.is_available():
            return
        try:
            import pynvml
        except ImportError:
            return
        index = cuda.current_device() if index is None else index
        with contextlib.suppress(pynvml.NVMLError):  # no driver library, or a container without access to it
            pynvml.nvmlInit()
            self._nvml, self._handle = pynvml, _handle(pynvml, str(cuda.get_device_properties(index).uuid))
            self.active = True

    def read(self) -> dict[str, float]:
        """`gpu_utilization` (%), `gpu_power` (W), `gpu_temperature` (°C), `gpu_memory_gib` (used, by all).

        Sensors that the device does not have are left out; `{}` without a device.
        """
        if not self.active:
            return {}
        nvml, handle = self._nvml, self._handle
        sensors: dict[str, Callable[[], float]] = {
            "gpu_utilization": lambda: float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu),
            "gpu_power": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            "gpu_temperature": lambda: float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
            "gpu_memory_gib": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used / 2**30,
        }
        values = {}
        for name, sensor in sensors.items():
            with contextlib.suppress(nvml.NVMLError):  # MIG slices and some cards lack a sensor
                values[name] = sensor()
        return values


def _handle(nvml: Any, uuid: str) -> Any:
    """NVML's handle of the device with CUDA's `uuid` (bare): a whole GPU, or a MIG slice of one."""
    try:
        return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except nvml.NVMLError:
        return nvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")
