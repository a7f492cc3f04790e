"""What is wrong with a row: a DataError that also says of what kind it is."""

from __future__ import annotations

from vlmr1.errors import DataError


class RowFault(DataError):
    """The message starts with `source`, "file:line"; `kind` is a short name such as "markers" or "missing image"."""

    def __init__(self, message: str, kind: str = "row", source: str = ""):
        super().__init__(message)  # a loader's worker makes it again from its message alone
        self.kind = kind
        self.source = source


def row_fault(source: str, kind: str, what: str) -> RowFault:
    """The fault of a row of `source`."""
    return RowFault(f"{source}: {what}", kind, source)
