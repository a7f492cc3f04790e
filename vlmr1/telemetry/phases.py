"""Seconds and peak memory by phase, and the GPUs of the machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

from vlmr1.telemetry.peaks import MIB, PEAKS


@dataclass(frozen=True)
class Gpu:
    """A GPU of this machine as reported by the driver."""

    index: int
    name: str
    driver: str
    total_mib: float
    used_mib: float  # by all processes


class Phases:
    """Seconds and peak memory by phase.

    `with phases("rollout"): ...` adds to `phases.seconds["rollout"]` and raises `phases.memory["rollout"]` to the peak
    in MiB. With CUDA a phase is measured between events, so that it includes its own kernels; only reading `seconds`
    waits for the device. A nested phase counts in both.

    Args:
        memory: measure the peak memory of the process, which resets the peaks of torch and of the kernel at each start
            and end of a phase (see `peaks.py`).
    """

    def __init__(self, *, memory: bool = False) -> None:
        self._seconds: dict[str, float] = {}
        self._between: list[tuple[str, Any, Any]] = []  # phases whose events were not read yet
        self.memory: dict[str, float] = {}
        self._measures_memory = memory
        self._open: dict[str, tuple[float, Any]] = {}  # start by phase: time, and event on CUDA

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by phase: one dictionary, to which `settle` adds."""
        self.settle()
        return self._seconds

    def settle(self) -> None:
        """Add the phases that were measured between events; waits for the device."""
        for name, start, end in self._between:
            end.synchronize()
            self._add(name, start.elapsed_time(end) / 1000)
        self._between.clear()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.start(name)
        try:
            yield
        finally:
            self.stop(name)

    def start(self, name: str) -> None:
        """Start a phase."""
        self._lap()
        self._open[name] = perf_counter(), _event()

    def stop(self, name: str) -> None:
        """End a phase. KeyError if it has not been started."""
        start, event = self._open[name]
        end = _event()
        if end is None:
            self._add(name, perf_counter() - start)
        elif event is None:  # CUDA was initialized in this phase
            end.synchronize()
            self._add(name, perf_counter() - start)
        else:
            self._between.append((name, event, end))
        self._lap()
        del self._open[name]

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def _lap(self) -> None:
        peak = PEAKS.lap() if self._measures_memory else None
        if peak is not None:
            self.memory |= {name: max(peak, self.memory.get(name, 0.0)) for name in self._open}


def peak_memory_mib() -> float:
    """Return the peak memory of this process in MiB: allocated by torch if it uses CUDA, else resident."""
    return PEAKS.peak()


def gpu_info() -> list[Gpu] | None:
    """Return the GPUs of this machine; None without nvidia-ml-py or a working driver."""
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


def _event() -> Any:
    """An event of this moment on the current stream; None without CUDA."""
    if not torch.cuda.is_initialized():
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
