"""What a test does to a run from within, at a file operation that it names: kill it, or let it meet a full disk.

Operations are Python's audit events: `open`, `os.mkdir`, `os.rename`, `os.remove`, ... with their path."""

import os
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class At:
    """Do something at the nth operation `event` on a path that ends with, or lies below, `part`."""

    event: str
    part: str
    do: Callable[[Path], None]
    count: int = 1
    argument: int = 0  # of the event: the destination of a renaming is 1
    mode: str | None = None  # of an opening

    def __call__(self) -> None:
        left = self.count

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            if event != self.event or left == 0 or not isinstance(arguments[self.argument], str | os.PathLike):
                return
            path = os.fspath(arguments[self.argument])
            if self.part not in f"{path}/" or (self.mode is not None and arguments[1] != self.mode):
                return
            left -= 1
            if left == 0:
                self.do(Path(path))

        sys.addaudithook(hook)


def kill(_path: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Grow:
    """Files end `more` bytes after what `of` has now: at the next write beyond, the system kills the process in the
    midst of it, or writes what fits and reports an error."""

    more: int
    kills: bool = True

    def __call__(self, path: Path) -> None:
        size = path.stat().st_size if path.is_file() else 0
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + self.more, resource.RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if self.kills else signal.SIG_IGN)
