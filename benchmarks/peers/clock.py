"""Seconds of a sample by phase, and the clock of a sample that is timed whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from time import perf_counter
from typing import Any

import torch

Clock = Callable[[str], AbstractContextManager[None]]


def untimed(_phase: str) -> AbstractContextManager[None]:
    """Nothing is measured, and the device is not waited for."""
    return nullcontext()


class PhaseClock:
    """`with clock("rollout"): ...` adds to `clock.seconds["rollout"]`. A phase inside another is taken from it, so
    that phases sum to what they cover; the device is waited for at each end."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._lap()
        self._open.append(phase)
        try:
            yield
        finally:
            self._lap()
            self._open.pop()

    def _lap(self) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = perf_counter()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now


def charged(function: Callable[..., Any], clock: Clock, phase: Callable[..., str] | str) -> Callable[..., Any]:
    """`function`, its calls charged to a phase, or to the one that `phase(*arguments)` names."""

    def call(*arguments: Any, **options: Any) -> Any:
        with clock(phase if isinstance(phase, str) else phase(*arguments)):
            return function(*arguments, **options)

    return call
