"""What NVML says of the one GPU that this process uses: memory, power, energy."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import torch

logger = logging.getLogger(__name__)
MIB = 2**20


class GpuMeter:
    """Readings of one GPU around an update: `begin()` before it, `end()` after it.

    `end` returns, each where the device supports it:
    gpu/memory_used_mib, used on the device by all processes; gpu/process_memory_mib, by this one;
    gpu/power_watts, drawn at that moment; gpu/energy_joules, drawn since `begin`, by the device's own counter.
    A reading that is not supported is left out, and a warning says so once.
    """

    def __init__(self, nvml: Any, handle: Any):
        self._nvml = nvml
        self._handle = handle
        self._energy: float | None = None
        self._missing: set[str] = set()

    @classmethod
    def of(cls, device: torch.device) -> GpuMeter | None:
        """The meter of a torch device; None for one that is no CUDA device, and without nvidia-ml-py or a driver.

        The device is found by its UUID, else by its place on the PCI bus: NVML's indices know nothing of
        CUDA_VISIBLE_DEVICES."""
        if device.type != "cuda":
            return None
        try:
            import pynvml
        except ImportError:
            return None
        try:
            pynvml.nvmlInit()
            return cls(pynvml, _handle(pynvml, torch.cuda.get_device_properties(device)))
        except pynvml.NVMLError as error:
            logger.warning("NVML does not know this process's GPU: %s", error)
            return None

    def begin(self) -> None:
        """Note the energy counter."""
        self._energy = self._joules()

    def end(self) -> dict[str, float]:
        """The readings now, and the energy since `begin`."""
        joules = self._joules()
        readings = {
            "gpu/memory_used_mib": self._read("memory in use", self._memory_used),
            "gpu/process_memory_mib": self._read("memory by process", self._process_memory),
            "gpu/power_watts": self._read(
                "power",
                lambda: self._nvml.nvmlDeviceGetPowerUsage(self._handle) / 1000,  # mW
            ),
            "gpu/energy_joules": None if joules is None or self._energy is None else joules - self._energy,
        }
        return {name: value for name, value in readings.items() if value is not None}

    def _joules(self) -> float | None:
        return self._read(
            "energy",
            lambda: self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1000,  # mJ
        )

    def _memory_used(self) -> float:
        return float(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used) / MIB

    def _process_memory(self) -> float | None:
        """None in a container, where the driver's process ids are others."""
        for process in self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle):
            if process.pid == os.getpid() and process.usedGpuMemory is not None:
                return float(process.usedGpuMemory) / MIB
        return None

    def _read(self, what: str, read: Callable[[], float | None]) -> float | None:
        if what in self._missing:
            return None
        try:
            return read()
        except self._nvml.NVMLError as error:
            self._missing.add(what)
            logger.warning("NVML: %s of this GPU is not reported: %s", what, error)
            return None


def _handle(nvml: Any, properties: Any) -> Any:
    """NVML's handle of the device that torch has these properties of."""
    try:
        return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
    except nvml.NVMLError:  # a slice of a GPU has a UUID of another kind
        place = (properties.pci_domain_id, properties.pci_bus_id, properties.pci_device_id)
        return nvml.nvmlDeviceGetHandleByPciBusId("{:08x}:{:02x}:{:02x}.0".format(*place))
