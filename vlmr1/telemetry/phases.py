"""What a run costs: seconds and peak memory by phase, and the GPUs of the machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

import torch

from vlmr1.telemetry.peaks import MIB, PEAKS


@dataclass(frozen=True)
class Gpu:
    """One GPU of this machine, as the driver reports it."""

    index: int
    name: str
    driver: str
    total_mib: float
    used_mib: float  # by all processes


class Phases:
    """Seconds and peak memory by phase: `with phases("rollout"): ...` adds to `phases.seconds["rollout"]`, and makes
    `phases.memory["rollout"]` the highest peak, in MiB, that it has had.

    On CUDA the device is synchronized at both ends, so that a phase is charged for its own kernels. A phase
    inside another one counts in both. Memory is of the process, what it held before included; it is measured with
    `memory=True`, which starts the high-water marks of torch and of the kernel anew at each end (see `peaks.py`).
    """

    def __init__(self, *, memory: bool = False) -> None:
        self.seconds: dict[str, float] = {}
        self.memory: dict[str, float] = {}
        self._measures_memory = memory
        self._open: dict[str, float] = {}  # when each began

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.start(name)
        try:
            yield
        finally:
            self.stop(name)

    def start(self, name: str) -> None:
        """The phase begins."""
        _synchronize()
        self._lap()
        self._open[name] = perf_counter()

    def stop(self, name: str) -> None:
        """The phase ends. KeyError for one that has not begun."""
        _synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + perf_counter() - self._open[name]
        self._lap()
        del self._open[name]

    def _lap(self) -> None:
        peak = PEAKS.lap() if self._measures_memory else None
        if peak is not None:
            self.memory |= {name: max(peak, self.memory.get(name, 0.0)) for name in self._open}


def peak_memory_mib() -> float:
    """Peak memory of this process in MiB since it began: allocated by torch where it uses CUDA, resident otherwise."""
    return PEAKS.peak()


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
