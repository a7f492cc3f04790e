"""The result of a check of data files, and its text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from vlmr1.data.faults import RowFault
from vlmr1.data.media import Tally
from vlmr1.errors import DataError

NAMED = 5  # rows that a message names
BINS, BAR = 10, 40  # histogram: maximum number of lines, and characters of the longest bar


@dataclass(frozen=True)
class Fault:
    """One fault of one row."""

    source: str  # "file:line"
    kind: str
    what: str

    def __str__(self) -> str:
        return f"{self.source}: {self.kind}: {self.what}"


@dataclass
class Findings:
    """Counts, faults in the order of the rows, and prompt lengths."""

    header: list[str] = field(default_factory=list)  # lines on templates and on files read in part
    rows: int = 0
    images: int = 0  # distinct ones that were decoded, or could not be
    faults: list[Fault] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)  # tokens of each prompt that could be made
    tally: Tally = field(default_factory=Tally)  # of the rows that could be read

    @property
    def status(self) -> int:
        """The exit status: 1 where there is a fault."""
        return 1 if self.faults else 0

    def text(self) -> str:
        """The header, a line a fault, the histogram of prompt lengths, columns and rows with images, and the totals."""
        lines = self.header + [str(fault) for fault in self.faults]
        lines += ["tokens a prompt:", histogram(self.lengths)] if self.lengths else []
        lines += self.tally.lines(self.rows)
        kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(each.kind for each in self.faults).items())
        found = f"{len(self.faults)} faults ({kinds})" if self.faults else "no faults"
        return "\n".join([*lines, f"{self.rows} rows, {self.images} images: {found}"])


def left_out_message(first: Sequence[str], count: int, total: int, why: str, how: str) -> str:
    """Say that a filter leaves `count` rows out, and name the `first` ones; `how` says what lists all."""
    more = f" and {count - len(first)} more; {how}" if count > len(first) else ""
    return f"{count} of {total} rows are left out: {why}: {', '.join(first)}{more}"


def as_fault(error: DataError, source: str) -> Fault:
    """Convert an error of the row at `source` to a fault; an error without a kind comes from a reward."""
    kind = error.kind if isinstance(error, RowFault) else "solution"
    return Fault(source, kind, str(error).removeprefix(f"{source}: "))


def histogram(values: Sequence[int]) -> str:
    """Return a histogram with bins of equal width, one a line."""
    low, high = min(values), max(values)
    width = -(-(high - low + 1) // BINS)
    counts = Counter((value - low) // width for value in values)
    most, digits = max(counts.values()), len(str(high))
    lines = []
    for place in range((high - low) // width + 1):
        start, end = low + place * width, min(high, low + (place + 1) * width - 1)
        bar = "#" * -(-BAR * counts[place] // most)
        lines.append(f"{start:>{digits}} to {end:>{digits}}  {bar:{BAR}}  {counts[place]}")
    return "\n".join(lines)
