"""Where a benchmark runs: its clock, the two ceilings that bound any arm, and the memory that is free.

On a GPU the clock is a pair of device events, so that the host's work counts only where the device waits for
it, and the L2 cache is overwritten before each call. On a CPU it is the wall clock.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.harness import timed

_FLUSH_BYTES = 256 * 2**20  # several times the largest L2


@dataclass(frozen=True)
class Ceilings:
    """What this device did in this run: a large copy, bytes read and written; a large product of matrices."""

    copy_gb_s: float
    matmul_tflop_s: float

    def share(self, seconds: float, flops: int, moved: int) -> float:
        """The least time that the work can take, over the time it took."""
        return max(flops / (1e12 * self.matmul_tflop_s), moved / (1e9 * self.copy_gb_s)) / seconds


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def slug(device: str) -> str:
    """The device as part of a file name: cpu, nvidia-h200."""
    name = torch.cuda.get_device_name() if device == "cuda" else device
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def clock(function: Callable[[], Any], device: str) -> Callable[[], float]:
    """`function` as an arm of `harness.alternate`: a call returns its seconds."""
    return event_timed(function) if device == "cuda" else timed(function)


def event_timed(
    function: Callable[[], Any],
    event: Callable[[], Any] = lambda: torch.cuda.Event(enable_timing=True),
    flush: Callable[[], Any] | None = None,
) -> Callable[[], float]:
    """Seconds between an event before and an event after the device's work, behind a flush of its cache."""
    if flush is None:
        flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda").zero_

    def arm() -> float:
        start, end = event(), event()
        flush()
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return arm


def ceilings(device: str, dtype: torch.dtype, rounds: int = 10) -> Ceilings:
    """Medians of `rounds` calls on random data: zeros are faster."""
    size, side = (2**31, 8192) if device == "cuda" else (2**28, 2048)
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))

    def seconds(function: Callable[[], Any]) -> float:
        arm = clock(function, device)
        arm()
        return median(arm() for _ in range(rounds))

    copied = seconds(lambda: target.copy_(source))
    multiplied = seconds(lambda: torch.mm(left, right))
    return Ceilings(2 * size / copied / 1e9, 2 * side**3 / multiplied / 1e12)


def free_bytes(device: str) -> int:
    """Memory that an arm may still take."""
    if device == "cuda":
        held_back = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + held_back
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/meminfo has no MemAvailable")
