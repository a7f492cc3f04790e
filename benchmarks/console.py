"""Console output of a run: a progress line, no messages of third-party libraries, and signals that end the run."""

from __future__ import annotations

import logging
import os
import signal
import warnings
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from time import perf_counter

QUIET = {
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
    "HF_HUB_OFFLINE": "1",
}


def quiet() -> None:
    """Keep warnings of libraries off the screen; to be called before torch is imported.

    What matters for a benchmark stands in its result: log levels are no part of it."""
    os.environ.update({name: os.environ.get(name, value) for name, value in QUIET.items()})
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def stop_on_signals() -> None:
    """SIGTERM and SIGHUP end a run as Ctrl-C does; a signal that the parent ignores (nohup) stays ignored."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)


class Progress:
    """Lines that say what runs now, and about how long is left."""

    def __init__(self, clock: Callable[[], float] = perf_counter, write: Callable[[str], object] | None = None):
        self.clock, self.start = clock, clock()
        self.write = write or (lambda line: print(line, flush=True))

    def say(self, text: str) -> None:
        self.write(f"[{self.clock() - self.start:6.0f} s] {text}")

    def round(
        self, name: str, number: int, rounds: int, samples: Mapping[str, Sequence[float]], warm: Mapping[str, float]
    ) -> None:
        """One arm's turn in a round. `warm`: seconds of each arm's first step, where there are no samples yet."""
        left = seconds_left(rounds, samples, warm)
        self.say(f"round {number} of {rounds}: {name}; about {duration(left)} left")


def seconds_left(rounds: int, samples: Mapping[str, Sequence[float]], warm: Mapping[str, float]) -> float:
    """Return the time of the samples that are still to come, by the median of each arm's own."""
    each = {name: median(samples[name]) if samples.get(name) else seconds for name, seconds in warm.items()}
    return sum((rounds - len(samples.get(name, ()))) * seconds for name, seconds in each.items())


def duration(seconds: float) -> str:
    """Return whole seconds below two minutes, minutes above."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
