"""Log what a reward function prints, and that it takes long, with its name and rows."""

from __future__ import annotations

import io
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout

logger = logging.getLogger(__name__)
SLOW = 30.0  # seconds until the first warning; each further one comes after twice the time


class LineWriter(io.TextIOBase):
    """A text stream that hands each line to a function; `close` hands over an unfinished one too."""

    encoding = "utf-8"  # type: ignore[assignment]

    def __init__(self, take: Callable[[str], None]):
        super().__init__()
        self.take = take
        self.rest = ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self.rest = (self.rest + text).split("\n")
        for line in filter(str.strip, lines):
            self.take(line)
        return len(text)

    def flush(self) -> None:
        """Keep an unfinished line; a handler of the function's may flush after `close`."""

    def fileno(self) -> int:
        """Return the descriptor of the standard output, for programs that the function starts."""
        return sys.__stdout__.fileno() if sys.__stdout__ is not None else super().fileno()

    def close(self) -> None:
        if not self.closed and self.rest.strip():
            self.take(self.rest)
        super().close()


def log_print(name: str, where: str, line: str) -> None:
    """Log a line that a reward function has printed."""
    logger.warning("reward %s printed %s: %s", name, where, line)


@contextmanager
def watched(name: str, where: str) -> Iterator[None]:
    """Log each line that the block prints, at once; warn while it takes long."""
    done = threading.Event()
    waiting = threading.Thread(target=_warn_while_slow, args=(done, name, where), daemon=True)
    waiting.start()
    writer = LineWriter(lambda line: log_print(name, where, line))
    try:
        with redirect_stdout(writer):
            yield
    finally:
        done.set()
        waiting.join()  # no warning comes after the call
        writer.close()


def _warn_while_slow(done: threading.Event, name: str, where: str) -> None:
    waited, until = 0.0, SLOW
    while not done.wait(until - waited):
        waited, until = until, 2 * until
        logger.warning("reward %s has taken %.0f s so far %s", name, waited, where)
