"""What runs in a process of the reward pool: one completion at a time."""

from __future__ import annotations

import os
import pickle
import threading
import time
from functools import cache
from multiprocessing.connection import Connection
from typing import Any

from vlmr1.lifecycle.processes import ignore_stop_signals, kill_with_parent
from vlmr1.rewards.registry import resolve

WATCH = 1.0  # seconds between looks at the parent

function_of = cache(resolve)


def main(descriptor: int, of_main_thread: bool) -> None:
    """Serve (spec, arguments) from the socket until it closes: "ready", then for each "started" and its outcome."""
    ignore_stop_signals()
    if of_main_thread:  # which lasts as long as the process
        kill_with_parent()
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()
    import math_verify  # noqa: F401  # a second of import belongs to the start, not to a completion

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
        function = function_of(spec)
        connection.send(("started", None))
        return "value", _plain(function(**arguments))
    except Exception as error:  # the user's code: anything can come out of it
        return "error", _portable(error)


def _plain(values: Any) -> Any:
    """Tensors and arrays as lists: a tensor would travel through shared memory."""
    return values.tolist() if hasattr(values, "tolist") else _portable_values(values)


def _portable_values(values: Any) -> Any:
    if isinstance(values, list | tuple):
        return [_plain(value) if hasattr(value, "tolist") else value for value in values]
    return values


def _portable(error: Exception) -> Exception:
    """The exception, or one with its text where it cannot be pickled and read back."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its class does there
        return RuntimeError(repr(error))
    return error


def _watch(parent: int) -> None:
    """End with the parent, even in the midst of a reward."""
    while os.getppid() == parent:
        time.sleep(WATCH)
    os._exit(1)
