"""glibc's heap: for a measured call, freed memory goes back to the system at once."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
AT_ONCE, USUAL = 64 * 2**10, 32 * 2**20  # bytes; the second is what glibc's own threshold grows to


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None


@contextmanager
def returned_at_once() -> Iterator[None]:
    """In this block the resident set is near what is alive, and never below: what was free before is returned, and new
    blocks of 64 KiB or more are mapped one by one, where no free piece of the heap holds them. That takes longer, so
    that nothing is timed in it. Without glibc it does nothing."""
    gc.collect()
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.malloc_trim(0)
    _thresholds(libc, AT_ONCE)
    try:
        yield
    finally:
        _thresholds(libc, USUAL)


def _thresholds(libc: ctypes.CDLL, size: int) -> None:
    libc.mallopt(M_MMAP_THRESHOLD, size)
    libc.mallopt(M_TRIM_THRESHOLD, 2 * size)
