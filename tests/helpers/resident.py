"""A block of memory that is certainly resident, and certainly new to the process."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def resident(mib: int) -> Iterator[None]:
    """In this block the process holds `mib` MiB more: mapped from the system, as the heap may have as much to spare,
    and every page written."""
    with mmap.mmap(-1, mib * 2**20) as block:
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
        yield
