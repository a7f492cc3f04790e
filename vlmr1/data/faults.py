"""Errors of a row of data, with the kind of the fault."""

from __future__ import annotations

from vlmr1.errors import DataError


class RowFault(DataError):
    """The message starts with `source`, "file:line"; `kind` is a short name such as "markers" or "missing image"."""

    def __init__(self, message: str, kind: str = "row", source: str = ""):
        super().__init__(message)  # a loader's worker rebuilds it from its message alone
        self.kind = kind
        self.source = source


def row_fault(source: str, kind: str, what: str) -> RowFault:
    """Return the error of the row at `source`, "file:line"."""
    return RowFault(f"{source}: {what}", kind, source)
