"""What a report consists of: parts with notes, tables and charts; figures as text; Markdown.

Text that comes from a file (labels, reasons) is escaped where it is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

from benchmarks.harness import Ratio, ratio
from benchmarks.harness import table as aligned

Column = Callable[[str], str | None]  # the cell of an arm; None where it has none


@dataclass(frozen=True)
class Table:
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        return aligned([plain(cell) for cell in self.head], [[plain(cell) for cell in row] for row in self.rows])


@dataclass(frozen=True)
class Part:
    """`charts` are names of `charts.charts`; a chart that was not drawn is passed over."""

    name: str
    title: str
    notes: Sequence[str] = ()
    tables: Sequence[Table] = ()
    points: Sequence[str] = ()  # a list under the tables
    charts: Sequence[str] = field(default=())


def plain(text: str) -> str:
    """Text as Markdown, on one line, that neither opens a cell nor a tag."""
    return " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def of_columns(first: str, arms: Sequence[str], labels: Mapping[str, str], columns: Mapping[str, Column]) -> Table:
    """A row an arm. A column that no arm fills is left out."""
    cells = {title: [column(arm) for arm in arms] for title, column in columns.items()}
    filled = {title: [each or "-" for each in column] for title, column in cells.items() if any(column)}
    rows = [[labels[arm], *(column[place] for column in filled.values())] for place, arm in enumerate(arms)]
    return Table([first, *filled], rows)


def number(value: float) -> str:
    """About three digits, never an exponent."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"


def percent(share: float) -> str:
    """Whole per cents; below one two digits."""
    return f"{share:.0%}" if share >= 0.01 else f"{100 * share:.2g}%"


def spread(samples: Sequence[float], scale: float = 1.0) -> str:
    """20th to 80th percentile."""
    if len(samples) < 2:
        return number(scale * samples[0])
    fifths = quantiles(samples, n=5, method="inclusive")
    return f"{number(scale * fifths[0])}..{number(scale * fifths[-1])}"


def speed(arms: Mapping[str, Any], name: str) -> Ratio:
    """How many times as fast as its base an arm is: median(base) / median(own), and the range over rounds."""
    base = arms[name]["base"]
    return ratio({name: arms[name]["seconds"], base: arms[base]["seconds"]}, base, name)


def faster(arms: Mapping[str, Any], name: str) -> str:
    """`speed` as text; the range only where both were called in turn."""
    found = speed(arms, name)
    return str(found) if arms[name].get("in_turn", True) else f"{found.value:.2f}"


def times(arms: Mapping[str, Any], name: str, other: str) -> str:
    """How many times as long as another arm an arm takes; with the range over rounds where both were called in turn."""
    found = ratio({each: arms[each]["seconds"] for each in (name, other)}, name, other)
    return str(found) if arms[name].get("in_turn", True) else f"{found.value:.2f}"


def milliseconds(arm: Mapping[str, Any]) -> float:
    return 1e3 * median(arm["seconds"])


def tokens_a_second(arm: Mapping[str, Any]) -> float:
    return arm["tokens"] / median(arm["seconds"])
