"""Peak memory of this process between two points in time: torch's allocations on CUDA, else the resident set."""

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
    """Resettable peak memory. The counters belong to the process, so use the only instance, `PEAKS`.

    On CUDA the peak is torch's `max_memory_allocated` of the current device. Elsewhere it is VmHWM of Linux, which is
    reset by writing 5 to /proc/self/clear_refs. If that is not permitted, `lap` returns None after one warning.
    """

    def __init__(self) -> None:
        self._highest = {"cuda": 0.0, "resident": 0.0}  # MiB, before the last lap
        self._laps = True  # whether the resident set's peak can be reset

    def lap(self) -> float | None:
        """Return the peak in MiB since the last lap and reset it; None if it cannot be measured."""
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
        """Return the peak in MiB since the process started."""
        if torch.cuda.is_initialized():
            return max(self._highest["cuda"], torch.cuda.max_memory_allocated() / MIB)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return max(self._highest["resident"], peak / MIB if sys.platform == "darwin" else peak / 1024)


PEAKS = Peaks()


def _resident_peak() -> float:
    """Return VmHWM in MiB, which is more current than ru_maxrss."""
    for line in STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("VmHWM:"):
            return float(line.split()[1]) / 1024  # the kernel's kB are KiB
    raise OSError(f"{STATUS} has no VmHWM")
