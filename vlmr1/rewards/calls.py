"""Results of `async` reward functions, which run together."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def awaited(value: Any) -> Any:
    """Return a value, or the result of a coroutine."""
    if not inspect.isawaitable(value):
        return value
    (result,) = run_together([value])
    if isinstance(result, BaseException):
        raise result
    return result


def run_together(coroutines: Sequence[Awaitable[Any]]) -> list[Any]:
    """Return the result of each coroutine, or the exception that it raised; they run at the same time.

    The event loop is that of another thread, because a notebook's own thread has one that is running."""

    async def every() -> list[Any]:
        return await asyncio.gather(*coroutines, return_exceptions=True)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, every()).result()


class Finished:
    """A function whose first call has been made already, together with those of other functions."""

    def __init__(self, function: Callable[..., Any], outcome: Any):
        self.function = function
        self.outcome = [outcome]

    def __call__(self, /, **arguments: Any) -> Any:
        if not self.outcome:
            return self.function(**arguments)
        outcome = self.outcome.pop()
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome
