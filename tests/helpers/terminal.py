"""Text on a terminal after control characters, and a terminal for the output of a forked run."""

import io
import os
import pty
import sys
import termios
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class Tty(io.StringIO):
    """A stream that says it is a terminal; several may write to one text."""

    def __init__(self, written: list[str]):
        super().__init__()
        self.written = written

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.written.append(text)
        return len(text)


def terminals(patch: Any) -> list[str]:
    """Make stdout and stderr terminals until the test ends; return all that they are given. Not for fixtures: pytest
    replaces the streams between them and the test."""
    written: list[str] = []
    for name in ("stdout", "stderr"):
        patch.setattr(sys, name, Tty(written))
    return written


def rendered(text: str) -> list[str]:
    """The lines of a screen, the one of the cursor last where nothing stands below it."""
    lines, row, column = [""], 0, 0
    place = 0
    while place < len(text):
        if text.startswith("\x1b[A", place):
            row, place = row - 1, place + 3
            continue
        character = text[place]
        if character == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif character == "\r":
            column = 0
        else:
            lines[row] = lines[row][:column].ljust(column) + character + lines[row][column + 1 :]
            column += 1
        place += 1
    return [line.rstrip() for line in lines]


@dataclass(frozen=True)
class Attach:
    """In a run: its output goes to this terminal."""

    name: str

    def __call__(self) -> None:
        descriptor = os.open(self.name, os.O_WRONLY | os.O_NOCTTY)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2))


def on_terminal(run: Callable[[Attach], None], columns: int = 150) -> str:
    """Call `run` with a terminal for the output of a process; return what was written to it."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (40, columns))
    found: list[bytes] = []

    def read() -> None:
        while data := _read(master):
            found.append(data)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        run(Attach(os.ttyname(slave)))
    finally:
        os.close(slave)
        reader.join()
        os.close(master)
    return b"".join(found).decode()


def _read(master: int) -> bytes:
    try:
        return os.read(master, 65536)
    except OSError:  # nobody has it open any more
        return b""
