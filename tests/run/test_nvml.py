"""GpuMonitor with a fake NVML and a fake CUDA device (and the real ones where there is a GPU)."""

import sys
import types

import pytest
import torch

from megatron_sas.run.nvml import GpuMonitor

NAMES = {"gpu_utilization", "gpu_power", "gpu_temperature", "gpu_memory_gib"}


class FakeNvml(types.ModuleType):
    """Two whole GPUs and one MIG slice without a utilisation sensor; readings depend on the handle."""

    NVML_TEMPERATURE_GPU = 0

    class NVMLError(Exception):
        pass

    def __init__(self, driver=True):
        super().__init__("pynvml")
        self.driver = driver
        self.devices = {"GPU-aaa": 0, "GPU-bbb": 1, "MIG-ccc": 2}

    def nvmlInit(self):
        if not self.driver:
            raise self.NVMLError("driver not loaded")

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid not in self.devices:
            raise self.NVMLError("not found")
        return self.devices[uuid]

    def nvmlDeviceGetUtilizationRates(self, handle):
        if handle == 2:
            raise self.NVMLError("not supported")
        return types.SimpleNamespace(gpu=90 + handle)

    def nvmlDeviceGetPowerUsage(self, handle):
        return 350_500 + handle

    def nvmlDeviceGetTemperature(self, handle, sensor):
        assert sensor == self.NVML_TEMPERATURE_GPU
        return 60 + handle

    def nvmlDeviceGetMemoryInfo(self, handle):
        return types.SimpleNamespace(used=(handle + 1) * 2**30)


class FakeCuda:
    """Two visible CUDA devices, in the opposite of NVML's order, and a MIG slice."""

    def __init__(self, available=True):
        self.is_available, self.current_device = lambda: available, lambda: 1

    def get_device_properties(self, index):
        return types.SimpleNamespace(uuid=["bbb", "aaa", "ccc", "unknown"][index])


def install(monkeypatch, module):
    monkeypatch.setitem(sys.modules, "pynvml", module)


def test_devices_are_found_by_uuid_not_by_index(monkeypatch):
    install(monkeypatch, FakeNvml())
    assert GpuMonitor(0, FakeCuda()).read() == {
        "gpu_utilization": 91.0,
        "gpu_power": pytest.approx(350.501),
        "gpu_temperature": 61.0,
        "gpu_memory_gib": 2.0,
    }
    assert GpuMonitor(cuda=FakeCuda()).read()["gpu_utilization"] == 90.0


def test_missing_sensors_are_left_out(monkeypatch):
    install(monkeypatch, FakeNvml())
    assert set(GpuMonitor(2, FakeCuda()).read()) == NAMES - {"gpu_utilization"}


@pytest.mark.parametrize("case", ["no cuda", "no module", "no driver", "unknown device"])
def test_inactive_without_nvml_or_gpu(monkeypatch, case):
    install(monkeypatch, FakeNvml(driver=case != "no driver") if case != "no module" else None)
    monitor = GpuMonitor(3 if case == "unknown device" else 0, FakeCuda(available=case != "no cuda"))
    assert not monitor.active
    assert monitor.read() == {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_real_device():
    values = GpuMonitor().read()
    assert set(values) <= NAMES and "gpu_memory_gib" in values
    assert 0 < values["gpu_memory_gib"] < 1000
