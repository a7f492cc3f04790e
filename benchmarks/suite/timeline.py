"""Memory over time within one step, sampled by a thread, with the phase at that moment."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from time import perf_counter

import torch

from benchmarks.harness import MIB
from vlmr1.grpo.trainer import GRPOTrainer
from vlmr1.telemetry.phases import Phases

INTERVAL = 0.005  # seconds between samples, as far as the interpreter lets the thread run
MOST = 2000  # samples that are kept
STATM = Path("/proc/self/statm")


class NotedPhases(Phases):
    """Phases that say which one is going on."""

    now = ""

    def start(self, name: str) -> None:
        super().start(name)
        self.now = name

    def stop(self, name: str) -> None:
        super().stop(name)
        self.now = ""


class Trainer(GRPOTrainer):
    """The trainer, its phases noted."""

    def begin_update(self) -> None:
        super().begin_update()
        self.phases = NotedPhases(memory=self.args.memory_by_phase)

    @property
    def phase(self) -> str:
        return getattr(self.phases, "now", "")


def held_mib() -> float:
    """What the process holds now: allocated by torch on a GPU, resident elsewhere."""
    if torch.cuda.is_initialized():
        return torch.cuda.memory_allocated() / MIB
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MIB


def timeline(run: Callable[[], None], phase: Callable[[], str]) -> tuple[float, list[tuple[float, float, str]]]:
    """(MiB held before, [seconds since the start, MiB above that, phase])"""
    before, start, ended = held_mib(), perf_counter(), Event()
    points: list[tuple[float, float, str]] = []

    def watch() -> None:
        while not ended.wait(INTERVAL):
            points.append((perf_counter() - start, held_mib() - before, phase()))

    thread = Thread(target=watch, daemon=True)
    thread.start()
    try:
        run()
    finally:
        ended.set()
        thread.join()
    return before, thinned(points)


def thinned(points: list[tuple[float, float, str]], most: int = MOST) -> list[tuple[float, float, str]]:
    """The highest of each run of neighbours, in order, so that about `most` are left and no peak is lost."""
    width = -(-len(points) // most) if points else 1
    return [max(points[i : i + width], key=lambda point: point[1]) for i in range(0, len(points), width)]
