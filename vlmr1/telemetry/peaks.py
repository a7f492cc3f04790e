"""Peak memory between two moments, of this process: what torch allocated on CUDA, the resident set elsewhere."""

from __future__ import annotations

import logging
import resource
import sys
from pathlib import Path

import torch

logger = logging.getLogger(__name__)
MIB = 2**20
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peaks:
    """Laps of the process's high-water mark. The mark is one for the whole process, and so is this: see `PEAKS`.

    On CUDA the mark is torch's `max_memory_allocated` of the current device. Elsewhere it is the kernel's VmHWM, which
    writing 5 to /proc/self/clear_refs sets back; where that is not allowed there are no laps, and a warning says so
    once. `peak` knows the highest mark all the same.
    """

    def __init__(self) -> None:
        self._highest = {"cuda": 0.0, "resident": 0.0}  # before the last lap, MiB
        self._laps = True  # of the resident set

    def lap(self) -> float | None:
        """Peak since the last lap in MiB, and a new lap; None where it cannot be known."""
        if torch.cuda.is_initialized():
            peak = torch.cuda.max_memory_allocated() / MIB
            torch.cuda.reset_peak_memory_stats()
            self._highest["cuda"] = max(self._highest["cuda"], peak)
            return peak
        if not self._laps:
            return None
        try:
            peak = _resident_peak()
            CLEAR.write_text("5")
        except OSError as error:
            self._laps = False
            logger.warning("peak memory by phase is not reported: %s", error)
            return None
        self._highest["resident"] = max(self._highest["resident"], peak)
        return peak

    def peak(self) -> float:
        """Peak since the process began, in MiB."""
        if torch.cuda.is_initialized():
            return max(self._highest["cuda"], torch.cuda.max_memory_allocated() / MIB)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return max(self._highest["resident"], peak / MIB if sys.platform == "darwin" else peak / 1024)


PEAKS = Peaks()


def _resident_peak() -> float:
    """VmHWM in MiB; it counts what ru_maxrss lags behind."""
    for line in STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("VmHWM:"):
            return float(line.split()[1]) / 1024  # the kernel's kB are KiB
    raise OSError(f"{STATUS} has no VmHWM")
