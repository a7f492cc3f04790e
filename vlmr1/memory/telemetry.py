"""What a run costs: seconds by phase, peak memory, and the state of the GPUs through NVML."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

import torch

MIB = 2**20


@dataclass(frozen=True)
class Gpu:
    """One GPU of this machine, as the driver reports it."""

    index: int
    name: str
    driver: str
    total_mib: float
    used_mib: float  # by all processes


class Phases:
    """Seconds by phase: `with phases("rollout"): ...` adds to `phases.seconds["rollout"]`.

    On CUDA the device is synchronized at both ends, so that a phase is charged for its own kernels. A phase
    inside another one counts in both.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        _synchronize()
        start = perf_counter()
        try:
            yield
        finally:
            _synchronize()
            self.seconds[name] = self.seconds.get(name, 0.0) + perf_counter() - start


def peak_memory_mib() -> float:
    """Peak memory of this process in MiB: allocated by torch where it uses CUDA, resident otherwise."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / MIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MIB if sys.platform == "darwin" else peak / 1024  # bytes there, KiB on Linux


def gpu_info() -> list[Gpu] | None:
    """The GPUs of this machine; None where nvidia-ml-py is not installed or finds no working driver."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        driver = pynvml.nvmlSystemGetDriverVersion()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        gpus = []
        for index, handle in enumerate(handles):
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            name = pynvml.nvmlDeviceGetName(handle)
            gpus.append(Gpu(index, name, driver, float(memory.total) / MIB, float(memory.used) / MIB))
        return gpus
    finally:
        pynvml.nvmlShutdown()


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
