"""NVML readings of the GPU of this process: memory, power, energy."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import torch

logger = logging.getLogger(__name__)
MIB = 2**20


class GpuMeter:
    """Readings of one GPU over an update: call `begin()` before it and `end()` after it.

    `end` returns gpu/memory_used_mib (by all processes), gpu/process_memory_mib (by this process), gpu/power_watts (at
    that time) and gpu/energy_joules (since `begin`). Readings that the device does not support are left out after one
    warning.
    """

    def __init__(self, nvml: Any, handle: Any):
        self._nvml = nvml
        self._handle = handle
        self._energy: float | None = None
        self._missing: set[str] = set()

    @classmethod
    def of(cls, device: torch.device) -> GpuMeter | None:
        """Return the meter of a torch device; None if it is not a CUDA device, or without nvidia-ml-py or a driver.

        Finds the device by UUID, else by PCI bus id, since NVML's indices ignore CUDA_VISIBLE_DEVICES."""
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
            logger.warning("NVML does not find the GPU of this process: %s", error)
            return None

    def begin(self) -> None:
        """Read the energy counter."""
        self._energy = self._joules()

    def end(self) -> dict[str, float]:
        """Return the current readings and the energy since `begin`, in the units of their names."""
        joules, read, handle = self._joules(), self._nvml, self._handle  # NVML has mJ and mW
        readings = {
            "gpu/memory_used_mib": self._read("memory in use", lambda: read.nvmlDeviceGetMemoryInfo(handle).used / MIB),
            "gpu/process_memory_mib": self._read("memory by process", self._process_memory),
            "gpu/power_watts": self._read("power", lambda: read.nvmlDeviceGetPowerUsage(handle) / 1000),
            "gpu/energy_joules": None if joules is None or self._energy is None else joules - self._energy,
        }
        return {name: value for name, value in readings.items() if value is not None}

    def _joules(self) -> float | None:
        return self._read("energy", lambda: self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3)  # mJ

    def _process_memory(self) -> float | None:
        """Return the memory of this process; None in a container, which has other process ids than the driver."""
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
    """Return NVML's handle of the device with these torch properties."""
    try:
        return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
    except nvml.NVMLError:  # a MIG slice has another kind of UUID
        place = (properties.pci_domain_id, properties.pci_bus_id, properties.pci_device_id)
        return nvml.nvmlDeviceGetHandleByPciBusId("{:08x}:{:02x}:{:02x}.0".format(*place))
