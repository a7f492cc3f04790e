"""Processes that work for a run: they leave signals to the run's own process, and do not outlive it."""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from vlmr1.errors import WorkerError
from vlmr1.lifecycle.console import drop_broken

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
PR_SET_PDEATHSIG = 1


def serve_run(_worker: int = 0) -> None:
    """Called in a worker process that the run's main thread has started."""
    leave_signals()
    end_with_parent()


def leave_signals() -> None:
    """Pass stop signals over, as the run goes on to the end of its step: terminals and schedulers send them to every
    process of a run. A second SIGTERM ends the worker: the run itself may send one."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _frame: signal.signal(number, signal.SIG_DFL))


def end_with_parent() -> None:
    """Linux: SIGKILL for this process when the thread that started it ends, even in the midst of a C function.
    Elsewhere nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def leave(status: int) -> NoReturn:
    """End this process. Where it is one of several ranks, what was registered for its exit is done, and no more: a
    thread of a process group that wakes while the interpreter is taken down would abort it, after a run that was
    done."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        atexit._run_exitfuncs()
        drop_broken()
        os._exit(status)
    sys.exit(status)


@contextmanager
def naming_lost_workers() -> Iterator[None]:
    """The RuntimeError that torch raises, wherever the run is, when a loader worker dies becomes a WorkerError."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        if not reason.startswith("DataLoader worker (pid"):
            raise
        raise WorkerError(
            f"{reason.rstrip('.')}: it made prompts. The last checkpoint is intact, the same command continues; "
            "where memory was short, fewer workers (dataloader_num_workers) take less"
        ) from error
