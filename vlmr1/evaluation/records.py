"""Records of rows on disk, a line a row, appended by whole batches and sorted by row at the end."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from vlmr1.data.boxes import Size
from vlmr1.errors import UserError
from vlmr1.lifecycle.checkpoint import replace_text

COMPLETIONS = "completions.jsonl"
PARTS = "completions.rank-*.jsonl"


@dataclass(frozen=True)
class RowRecord:
    """Results of one row."""

    row: int  # place in the data that is evaluated
    source: str  # "file:line"

    def line(self) -> str:
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def read(cls, values: dict[str, Any]) -> Self:
        """Return the record of a line. TypeError for a line of other names."""
        return cls(**values)


@dataclass(frozen=True)
class Record(RowRecord):
    """The completion of one row."""

    token_ids: tuple[int, ...]
    completion: str
    finish_reason: str  # "stop" | "length"
    image_size: Size | None = None  # width and height of the upright file in px, for rows with one image
    box_extent: Size | None = None  # the lower right corner of that image in the coordinates of the model
    think_opening: str = ""  # with which the prompt ends

    @property
    def text(self) -> str:
        """The completion behind the `<think>` that the prompt has opened."""
        return self.think_opening + self.completion

    @property
    def sizes(self) -> tuple[Size, Size]:
        """The extent of the coordinates that the boxes are in, and the size of the image in px."""
        assert self.box_extent is not None and self.image_size is not None
        return self.box_extent, self.image_size

    @classmethod
    def read(cls, values: dict[str, Any]) -> Record:
        record = cls(**values)
        size, extent = (pair and (pair[0], pair[1]) for pair in (record.image_size, record.box_extent))
        return replace(record, token_ids=tuple(record.token_ids), image_size=size, box_extent=extent)


class RecordFiles:
    """The files of one evaluation: `completions.jsonl`, and one file a rank while several ranks decode. `kind` is the
    class of their records."""

    def __init__(self, folder: Path, rows: int, batch_size: int, kind: Any = Record):
        self.folder = folder
        self.kind = kind
        self.batches = [range(at, min(at + batch_size, rows)) for at in range(0, rows, batch_size)]

    @property
    def path(self) -> Path:
        return self.folder / COMPLETIONS

    def part(self, rank: int, ranks: int) -> Path:
        """The file that a rank appends to."""
        return self.path if ranks == 1 else self.folder / PARTS.replace("*", str(rank))

    def gather(self) -> dict[int, Any]:
        """Merge the files of all ranks into `completions.jsonl`, sorted by row; drop incomplete batches and lines.

        No rank may write meanwhile."""
        kept = self.done()
        if kept or self.path.exists():
            replace_text(self.path, "".join(kept[row].line() for row in sorted(kept)))
        for path in self.folder.glob(PARTS):
            path.unlink()
        return kept

    def done(self) -> dict[int, Any]:
        """Return the records of complete batches, by row."""
        found = {record.row: record for path in self._paths() for record in read_records(path, self.kind)}
        return {row: found[row] for batch in self.batches if all(row in found for row in batch) for row in batch}

    def missing(self, done: Iterable[int]) -> list[range]:
        """Return the batches that are not decoded yet."""
        rows = set(done)
        return [batch for batch in self.batches if batch[0] not in rows]

    def _paths(self) -> Sequence[Path]:
        return [path for path in (self.path, *sorted(self.folder.glob(PARTS))) if path.exists()]


def append(path: Path, records: Iterable[RowRecord]) -> None:
    """Append the records of a batch and sync them to disk."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(record.line() for record in records)
        file.flush()
        os.fsync(file.fileno())


def read_records(path: Path, kind: Any = Record) -> list[Any]:
    """Read the records of a file, without an unfinished last line of a killed process."""
    lines = path.read_bytes().split(b"\n")
    records = []
    # After the last end of line there is nothing, or an unfinished line.
    for number, line in enumerate(lines[:-1], start=1):
        try:
            records.append(kind.read(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}:{number}: not a record of an evaluation: {error}") from error
    return records
