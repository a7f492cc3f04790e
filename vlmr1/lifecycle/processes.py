"""Worker processes of a run: they ignore stop signals and end with the run."""

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
from vlmr1.lifecycle.console import redirect_broken_streams

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
PR_SET_PDEATHSIG = 1


def init_worker(_worker: int = 0) -> None:
    """Set up a worker process; it must be started by the main thread of the run."""
    ignore_stop_signals()
    kill_with_parent()


def ignore_stop_signals() -> None:
    """Ignore stop signals, which terminals and schedulers send to every process, while the run finishes its step.

    A second SIGTERM ends the worker: the run itself may send it."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _frame: signal.signal(number, signal.SIG_DFL))


def kill_with_parent() -> None:
    """Have Linux kill this process when the thread that started it ends; no-op on other systems."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def exit_process(status: int) -> NoReturn:
    """Exit. With several ranks only run the atexit handlers, without interpreter shutdown.

    During the shutdown a thread of the process group could abort the process after a successful run."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        atexit._run_exitfuncs()
        redirect_broken_streams()
        os._exit(status)
    sys.exit(status)


@contextmanager
def translate_worker_death() -> Iterator[None]:
    """Context manager that turns torch's RuntimeError for a dead data loader worker into a WorkerError."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        if not reason.startswith("DataLoader worker (pid"):
            raise
        raise WorkerError(
            f"{reason.rstrip('.')}: it prepared prompts. The last checkpoint is complete: run the same command to "
            "resume. If memory was short, set a lower dataloader_num_workers"
        ) from error
