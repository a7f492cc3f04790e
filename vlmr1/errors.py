"""Errors due to the user's input, each reported as one message with exit status 2 and no traceback."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any


class UserError(Exception):
    """Something the user can mend; the message names the file and line, or the setting."""


class SettingError(UserError):
    """A setting that is unknown, out of range, or that cannot be honoured with the others."""


def import_for(needed_by: str, module: str, install: str) -> Any:
    """Import and return a module that only some features need. SettingError names the feature and what to install."""
    try:
        return import_module(module)
    except ImportError as error:
        raise SettingError(f"{needed_by} needs {module.partition('.')[0]}: pip install '{install}'") from error


def missing_package(needed_by: str, module: str, install: str) -> Iterator[str]:
    """Yield what to install for a setting whose module is not installed."""
    if find_spec(module) is None:
        yield f"{needed_by} needs {module.replace('_', '-')}: pip install '{install}'"


def faults_of(check: Callable[[], object]) -> Iterator[str]:
    """The message of the error that a check of settings raises, if it raises one."""
    try:
        check()
    except (SettingError, OutputError, ValueError, ImportError) as error:
        yield str(error)


class MemoryShort(SettingError):
    """Memory does not hold what the settings ask for."""


class DataError(UserError):
    """A row or an image that cannot be used; the message starts with "file:line"."""


class RewardError(UserError):
    """A reward function that raised or returned something that is not a number."""


class DivergedError(UserError):
    """Too many updates in a row whose loss or gradient was not finite."""


class CheckpointError(UserError):
    """A checkpoint that cannot be read, or that was deleted while it was read."""


class OutputError(UserError):
    """The output directory cannot be written: full, read-only, gone."""


class WorkerError(UserError):
    """A process that works for a run has died."""


class Stopped(BaseException):
    """A signal asked the run to end; `status` is what shells report for it, 128 + its number."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class RankError(UserError):
    """Another process of the run has ended."""
