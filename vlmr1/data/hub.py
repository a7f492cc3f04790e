"""Hugging Face data sets, local or from the hub, as rows. `datasets` is imported on first use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlmr1.data.faults import row_fault
from vlmr1.data.rows import Row, Rows
from vlmr1.errors import SettingError, import_for


class DatasetRows(Rows):
    """Rows of a memory-mapped Arrow table; images stay encoded, as bytes or a path."""

    def __init__(self, name: str, dataset: Any):
        self.name = name
        self.dataset = dataset.with_format("arrow")  # nothing is decoded

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> Row:
        return table_row(self.dataset[index : index + 1], self.source(index))

    def table(self, places: Sequence[int]) -> Any:
        return self.dataset.select(places)


def table_row(table: Any, source: str) -> Row:
    """Return the row of a table of one row. DataError for text that is not UTF-8 or a date out of range."""
    from pyarrow import ArrowException

    try:
        return table.to_pylist()[0]
    except (ValueError, OverflowError, ArrowException) as error:
        raise row_fault(source, "table", f"the row cannot be read: {error}") from error


def parquet_rows(path: Path) -> DatasetRows:
    """Rows of a Parquet file, mapped from the Arrow copy in the cache of `datasets`."""
    datasets = imported(str(path))
    return _made(str(path), lambda: datasets.Dataset.from_parquet(str(path)))


def folder_rows(path: Path, split: str | None) -> DatasetRows:
    """Rows of a directory written by `save_to_disk`."""
    datasets = imported(str(path))
    name = str(path) if split is None else f"{path}@{split}"
    return _made(name, lambda: _split_of(datasets.load_from_disk(str(path)), split, str(path)))


def hub_rows(name: str, split: str) -> DatasetRows:
    """Rows of one split of a hub data set."""
    datasets = imported(name)
    return _made(f"{name}@{split}", lambda: datasets.load_dataset(name, split=split))


def imported(name: str) -> Any:
    """Import the `datasets` package. SettingError names the extra where it is not installed."""
    return import_for(f"data_file_paths: {name}", "datasets", "vlmr1[data]")


def _made(name: str, load: Callable[[], Any]) -> DatasetRows:
    from datasets.exceptions import DatasetsError
    from pyarrow import ArrowException

    try:
        return DatasetRows(name, load())
    except (OSError, ValueError, TypeError, ArrowException, DatasetsError) as error:
        raise SettingError(f"data_file_paths: {name} cannot be read: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """The first line of the innermost error: `datasets` says only that it failed where the types of a column differ."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _split_of(loaded: Any, split: str | None, name: str) -> Any:
    """Return the single data set, or the named split."""
    if not hasattr(loaded, "keys"):
        if split is not None:
            raise SettingError(f"data_file_paths: {name} is a single data set, it has no split {split!r}")
        return loaded
    splits = list(loaded.keys())
    if split is None and len(splits) == 1:
        return loaded[splits[0]]
    if split not in splits:
        raise SettingError(f"data_file_paths: name a split of {name}, {name}@SPLIT: one of {', '.join(splits)}")
    return loaded[split]
