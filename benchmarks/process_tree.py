"""Peak memory of a process and all that it started, sampled from /proc by a thread."""

from __future__ import annotations

import os
from pathlib import Path
from threading import Event, Thread

from benchmarks.harness import status_fields


def tree_mib(root: int, proc: Path) -> float:
    """Return the sum of the resident sets of a process and its descendants; shared pages count in each of them."""
    fields = {int(folder.name): status_fields(folder / "status") for folder in proc.glob("[0-9]*")}
    tree = {root}
    while more := {pid for pid, of in fields.items() if int(of.get("PPid", "0")) in tree} - tree:
        tree |= more
    return sum(int(fields.get(pid, {}).get("VmRSS", "0 kB").split()[0]) for pid in tree) / 1024


class TreePeak:
    """The highest `tree_mib` of this process, for as long as the `with` block lasts; 0 where there is no /proc."""

    def __init__(self, root: int | None = None, proc: Path = Path("/proc"), interval: float = 0.5):
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
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.sample()
