"""The main function of a worker of the reward pool: score one completion at a time."""

from __future__ import annotations

import os
import pickle
import threading
import time
from contextlib import closing, redirect_stdout
from functools import cache
from multiprocessing.connection import Connection
from typing import Any

from vlmr1.lifecycle.processes import ignore_stop_signals, kill_with_parent
from vlmr1.rewards.registry import resolve
from vlmr1.rewards.watch import LineWriter

WATCH = 1.0  # seconds between checks of the parent process

function_of = cache(resolve)


def main(descriptor: int, of_main_thread: bool) -> None:
    """Serve (spec, arguments) from the socket until it closes: send "ready", then "started" and its outcome.

    Each line that a function prints is sent at once as "printed"."""
    ignore_stop_signals()
    if of_main_thread:  # the parent thread lasts as long as its process
        kill_with_parent()
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()
    import math_verify  # noqa: F401  # its import of a second must not count against a completion

    connection = Connection(descriptor)
    connection.send(("ready", None))
    while True:
        try:
            spec, arguments = connection.recv()
        except EOFError:
            return
        connection.send(_outcome(connection, spec, arguments))


def _outcome(connection: Connection, spec: str, arguments: dict[str, Any]) -> tuple[str, Any]:
    try:
        with closing(LineWriter(lambda line: connection.send(("printed", line)))) as printed, redirect_stdout(printed):
            function = function_of(spec)
            connection.send(("started", None))
            return "value", _plain(function(**arguments))
    except Exception as error:  # user code may raise anything
        return "error", _portable(error)


def _plain(values: Any) -> Any:
    """Convert tensors and arrays, also those in a list, to lists: a tensor would be sent through shared memory."""
    if isinstance(values, list | tuple):
        return [_plain(value) for value in values]
    return values.tolist() if hasattr(values, "tolist") else values


def _portable(error: Exception) -> Exception:
    """Return the exception, or a RuntimeError with its text where it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # its class may raise anything
        return RuntimeError(repr(error))
    return error


def _watch(parent: int) -> None:
    """Exit when the parent has ended, even during a reward."""
    while os.getppid() == parent:
        time.sleep(WATCH)
    os._exit(1)
