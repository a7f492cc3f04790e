"""Progress line of a run, rewritten in place on a terminal or in a notebook's cell, and permanent lines above it."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm
from transformers.utils.import_utils import is_in_notebook

FORMAT = "step {n_fmt}/{total_fmt} {bar:20}  {desc}  {rate_inv_fmt}  ETA {remaining}"
WIDTH = 176  # columns of a line in a file or a notebook


class Screen:
    """Output of a run. Without a terminal or a notebook it is plain lines on stdout."""

    def __init__(self, total: int, done: int):
        options: dict[str, Any] = {"total": total, "initial": done, "unit": "update", "position": 0}
        options["bar_format"] = FORMAT
        self.line: NotebookLine | TerminalLine | None = None
        if is_in_notebook():
            self.line = NotebookLine(**options)
        elif sys.stderr.isatty():
            self.line = TerminalLine(**options)
        self.plain = not (isinstance(self.line, NotebookLine) or sys.stdout.isatty())

    @property
    def width(self) -> int:
        """Columns of a permanent line."""
        return WIDTH if self.plain or isinstance(self.line, NotebookLine) else columns(sys.stdout)

    def advance(self, text: str) -> None:
        """Count an update, and show `text` in the progress line."""
        if self.line is not None:
            self.line.set_description_str(text, refresh=False)
            self.line.update(1)

    def say(self, text: str) -> None:
        """Write a permanent line."""
        if isinstance(self.line, NotebookLine):
            self.line.above.append(text)
        else:
            print(text, flush=True)
        if self.line is not None:
            self.line.refresh()

    def close(self) -> None:
        """Remove the progress line; permanent lines stay."""
        if self.line is not None:
            self.line.leave = False
            self.line.close()


class NotebookLine(tqdm):
    """Shown in the output of a cell, below the permanent lines `above` it."""

    def __init__(self, **options: Any):
        from IPython.display import display  # type: ignore[reportMissingImports]

        self.above: list[str] = []
        self.output: Any = display({"text/plain": ""}, raw=True, display_id=True)
        super().__init__(file=io.StringIO(), ncols=WIDTH, ascii=False, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        lines = [*self.above, str(self) if msg is None else msg]
        self.output.update({"text/plain": "\n".join(filter(None, lines))}, raw=True)
        return True


class TerminalLine(tqdm):
    """Shown on stderr. While it is open, what others write to the terminal begins on an empty line."""

    def __init__(self, **options: Any):
        self.drawn = False
        self.replaced: dict[str, tuple[Any, Any]] = {}  # streams of sys by name, and what takes their place
        super().__init__(file=sys.stderr, ncols=columns(sys.stderr), **options)
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream.isatty():
                self.replaced[name] = (stream, ClearedStream(stream, self))
                _redirect(name, *self.replaced[name])

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        self.drawn, self.ncols = True, columns(self.fp)
        return bool(super().display(msg, pos))

    def clear(self, nolock: bool = False) -> None:
        if self.drawn:
            self.drawn = False
            super().clear(nolock)

    def close(self) -> None:
        super().close()
        while self.replaced:
            name, (before, present) = self.replaced.popitem()
            _redirect(name, present, before)


class ClearedStream:
    """A stream that erases the progress line before a text of others."""

    def __init__(self, stream: Any, line: TerminalLine):
        self._stream, self._line = stream, line

    def write(self, text: str) -> int:
        self._line.clear()
        return self._stream.write(text)

    def writelines(self, texts: Iterable[str]) -> None:
        for text in texts:
            self.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _redirect(name: str, old: Any, new: Any) -> None:
    """Replace a stream of sys, also where log handlers write to it, unless another has replaced it."""
    if getattr(sys, name) is not old:
        return
    setattr(sys, name, new)
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    for handler in {handler for logger in loggers for handler in getattr(logger, "handlers", ())}:
        if isinstance(handler, logging.StreamHandler) and handler.stream is old:
            handler.setStream(new)


def columns(stream: Any) -> int:
    """Return the columns of the terminal that a stream writes to; 80 where they are not known."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (AttributeError, OSError, ValueError):
        return 80
