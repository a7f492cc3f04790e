"""Peak memory of a process and all that it started, sampled from /proc by a thread."""

from __future__ import annotations

import os
from pathlib import Path
from threading import Event, Thread

from benchmarks.harness import status_mib

PROC = Path("/proc")
INTERVAL = 0.5  # seconds between samples


def parents(proc: Path) -> dict[int, int]:
    """Return the parent of every process; those that end meanwhile are left out."""
    found = {}
    for folder in proc.glob("[0-9]*"):
        try:
            lines = (folder / "status").read_text(encoding="ascii", errors="replace").splitlines()
        except OSError:
            continue
        found |= {int(folder.name): int(line.split()[1]) for line in lines if line.startswith("PPid:")}
    return found


def tree_mib(root: int, proc: Path = PROC) -> float:
    """Sum of the resident sets of a process and its descendants, in MiB; shared pages count in each of them."""
    parent_of, tree = parents(proc), {root}
    while more := {pid for pid, parent in parent_of.items() if parent in tree} - tree:
        tree |= more
    total = 0.0
    for pid in tree:
        try:
            total += status_mib(proc / str(pid) / "status", "VmRSS")
        except OSError:  # it has ended, or is a zombie without memory
            continue
    return total


class TreePeak:
    """The highest `tree_mib` of this process, for as long as the `with` block lasts; 0 where there is no /proc."""

    def __init__(self, root: int | None = None, proc: Path = PROC, interval: float = INTERVAL):
        self.root, self.proc, self.interval = os.getpid() if root is None else root, proc, interval
        self.mib = 0.0
        self._ended = Event()
        self._thread = Thread(target=self._watch, daemon=True)

    def sample(self) -> None:
        self.mib = max(self.mib, tree_mib(self.root, self.proc))

    def _watch(self) -> None:
        while not self._ended.wait(self.interval):
            self.sample()

    def __enter__(self) -> TreePeak:
        self.sample()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.sample()
