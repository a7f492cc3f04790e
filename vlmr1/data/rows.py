"""Files of rows: an index of their positions, and a row read on access."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmr1.data.faults import row_fault
from vlmr1.data.messages import kind_of
from vlmr1.errors import SettingError

Row = Mapping[str, Any]


class Rows(ABC):
    """Rows of one file or data set. It is pickled for the loader's workers, so it holds no open file."""

    name: str

    @abstractmethod
    def __len__(self) -> int: ...

    def line(self, index: int) -> int:
        """The line of a row, from 1; the row's number where there are no lines."""
        return index + 1

    @abstractmethod
    def read(self, index: int) -> Row:
        """Read the row. DataError where it is invalid."""

    def source(self, index: int) -> str:
        """ "file:line" """
        return f"{self.name}:{self.line(index)}"

    def table(self, places: Sequence[int]) -> Any:
        """Return these rows as a `datasets.Dataset`; None where they are rows of JSON."""
        return None


class ListRows(Rows):
    """Rows in memory."""

    def __init__(self, name: str, rows: Sequence[Row]):
        self.name = name
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> Row:
        return self.rows[index]


class LineRows(Rows):
    """JSON lines without blank lines. The index takes 16 bytes a row."""

    def __init__(self, path: str | Path):
        self.name = str(path)
        self.starts = array("q")  # byte offsets of the rows, and the end of the file
        self.lines = array("q")
        at = 0
        with Path(path).open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    self.starts.append(at)
                    self.lines.append(number)
                at += len(line)
        self.starts.append(at)
        self.size = at

    def __len__(self) -> int:
        return len(self.lines)

    def line(self, index: int) -> int:
        return self.lines[index]

    def read(self, index: int) -> Row:
        source = self.source(index)
        with Path(self.name).open("rb") as file:
            if os.fstat(file.fileno()).st_size != self.size:
                raise row_fault(source, "changed file", "the file has changed since it was opened")
            file.seek(self.starts[index])
            data = file.read(self.starts[index + 1] - self.starts[index])
        try:
            value = json.loads(data.rstrip().decode("utf-8-sig" if self.lines[index] == 1 else "utf-8"))
        except UnicodeDecodeError as error:  # bytes, so that a line that is not UTF-8 can be named
            raise row_fault(source, "encoding", f"not UTF-8: {error.reason} at byte {error.start}") from error
        except (ValueError, RecursionError) as error:
            raise row_fault(source, "json", f"not JSON: {_reason(error)}") from error
        return _checked(value, source)


class ArrayRows(Rows):
    """A file with one JSON array of rows. Its text is held in memory; rows are parsed on access."""

    def __init__(self, path: str | Path):
        self.name = str(path)
        try:
            self.text = Path(path).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise row_fault(f"{path}:1", "encoding", f"not UTF-8: {error.reason} at byte {error.start}") from error
        self.starts = array("q")
        self.lines = array("q")
        self._index()

    def __len__(self) -> int:
        return len(self.starts)

    def line(self, index: int) -> int:
        return self.lines[index]

    def read(self, index: int) -> Row:
        value, _ = json.JSONDecoder().raw_decode(self.text, self.starts[index])
        return _checked(value, self.source(index))

    def _index(self) -> None:
        decoder, text = json.JSONDecoder(), self.text
        at, line, counted = _next(text, _next(text, 0) + 1), 1, 0  # after the bracket
        while text[at : at + 1] != "]" or self.starts:
            line, counted = line + text.count("\n", counted, at), at
            source = f"{self.name}:{line}"
            try:
                _, end = decoder.raw_decode(text, at)
            except (ValueError, RecursionError) as error:
                raise row_fault(source, "json", f"not JSON: {_reason(error)}") from error
            self.starts.append(at)
            self.lines.append(line)
            at = _next(text, end)
            if text[at : at + 1] == "]":
                break
            if text[at : at + 1] != ",":
                raise row_fault(source, "json", "not JSON: no comma or bracket after this row")
            at = _next(text, at + 1)
        if _next(text, at + 1) < len(text):
            raise row_fault(f"{self.name}:{1 + text.count(chr(10), 0, at)}", "json", "not JSON: text after the array")


def json_rows(path: Path) -> Rows:
    """Open JSON lines, or an array where the file begins with a bracket and has a suffix other than .jsonl."""
    if path.suffix.lower() == ".jsonl":
        return LineRows(path)
    try:
        with path.open("rb") as file:
            head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    except OSError as error:
        raise SettingError(f"data_file_paths: {path} cannot be read: {error.strerror}") from error
    return ArrayRows(path) if head.startswith(b"[") else LineRows(path)


def _next(text: str, at: int) -> int:
    """Return the position of the next character that is not white space."""
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _checked(value: Any, source: str) -> Row:
    if not isinstance(value, dict):
        raise row_fault(source, "not a row", f"not a JSON object but {kind_of(value)}")
    return value


def _reason(error: Exception) -> str:
    return str(error).replace(": line 1 column", " at column")
