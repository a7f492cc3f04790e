"""Output that nobody reads any more: a run goes on without it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def surviving() -> Iterator[None]:
    """For what is printed in the midst of a run: a reader that is gone (`| tee` ends with the Ctrl-C that should save
    the run; a closed terminal; a full disk) ends the output, not the run."""
    try:
        yield
    except OSError:
        drop_broken()


def drop_broken() -> None:
    """Send stdout and stderr nowhere, each if it cannot be written any more; Python would exit with 120 for it."""
    for name in ("stdout", "stderr"):
        try:
            getattr(sys, name).flush()
        except OSError:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - until the process ends


def last_words(message: str) -> None:
    """A line on stderr, if it is read; what is left in both streams must not fail later."""
    with surviving():
        for bar in list(getattr(tqdm, "_instances", ())):  # its line would be the message's
            bar.close()
        print(f"vlmr1: {message}", file=sys.stderr)
    drop_broken()
