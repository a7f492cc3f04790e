"""Which rows of each data file are taken: the first, the last or drawn ones, and files in proportion to weights.

A list of files in YAML has the format of VLM-R1's data lists (`datasets`: entries with `json_path` and
`sampling_strategy`). An entry may also have `weight` and `image_folder`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

import yaml

from vlmr1.data.rows import Row, Rows
from vlmr1.errors import SettingError, faults_of

STRATEGY = re.compile(r"(first|end|random):(\d+(?:\.\d+)?)(%?)")
ENTRY = {"json_path": str, "sampling_strategy": str, "weight": int | float, "image_folder": str}


@dataclass(frozen=True)
class Sampling:
    """`all`, or a number or share of rows: `first:N`, `end:N`, `random:N`, `first:N%`, ..."""

    kind: str = "all"
    amount: Fraction = Fraction(100)
    percent: bool = True

    @classmethod
    def of(cls, text: str) -> Sampling:
        """Parse a strategy; SettingError where it is none."""
        match = STRATEGY.fullmatch(text)
        amount = Fraction(match[2]) if match else Fraction(0)
        percent = bool(match and match[3])
        if text == "all":
            return cls()
        if match is None or amount <= 0 or (amount > 100 if percent else amount.denominator != 1):
            raise SettingError(
                f"sampling_strategy is {text!r}: it must be all, first:N, end:N or random:N, where N is a number of "
                "rows, at least 1, or a share such as 10%"
            )
        return cls(match[1], amount, percent)

    def count(self, rows: int) -> int:
        """Return how many of `rows` rows are taken; a share is rounded up."""
        return min(rows, math.ceil(self.amount * rows / 100) if self.percent else int(self.amount))

    @property
    def limit(self) -> int | None:
        """The number of rows of `first:N`. None: all. SettingError where the number of rows must be known."""
        if self.kind == "all":
            return None
        if self.kind == "first" and not self.percent:
            return int(self.amount)
        raise SettingError(f"sampling_strategy {self} cannot be used with streaming: only all and first:N can")

    def places(self, rows: int, random: Random) -> Sequence[int]:
        """Return the places of the rows that are taken, in their order."""
        count = self.count(rows)
        if self.kind == "random":
            return sorted(random.sample(range(rows), count))
        return range(rows - count, rows) if self.kind == "end" else range(count)

    def __str__(self) -> str:
        return self.kind if self.kind == "all" else f"{self.kind}:{float(self.amount):g}{'%' * self.percent}"


@dataclass(frozen=True)
class DataFile:
    """A data file, and what an entry of a YAML list says about it."""

    name: str
    sampling: str | None = None
    weight: float | None = None
    folder: str | None = None


class SelectedRows(Rows):
    """Some rows of a file, with the lines that they have there."""

    def __init__(self, rows: Rows, places: Sequence[int]):
        self.name = rows.name
        self.rows = rows
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    def line(self, index: int) -> int:
        return self.rows.line(self.places[index])

    def read(self, index: int) -> Row:
        return self.rows.read(self.places[index])

    def source(self, index: int) -> str:
        return self.rows.source(self.places[index])

    def table(self, places: Sequence[int]) -> Any:
        return self.rows.table([self.places[place] for place in places])


@dataclass(frozen=True)
class Mixture:
    """`sampling_strategy` and `data_weights` of the data files, one for each (or one strategy for all), and the seed
    of what is drawn."""

    sampling: Sequence[str] = ()
    weights: Sequence[float] = ()
    seed: int = 42

    def files(self, names: Sequence[str]) -> list[DataFile]:
        """Return the files with their strategies and weights, those of YAML lists in place of the list.

        Raises one SettingError with everything that is wrong, a line each."""
        files = [file for name in names for file in listed(name)]
        strategies = list(self.sampling) * (len(files) if len(self.sampling) == 1 else 1)
        given = (("sampling_strategy", "sampling", strategies), ("data_weights", "weight", list(self.weights)))
        faults = []
        for setting, name, values in given:
            if values and any(getattr(file, name) is not None for file in files):
                faults.append(f"{setting} is given, and a list of data_file_paths has it too: leave one out")
            elif values and len(values) != len(files):
                faults.append(f"{setting} has {len(values)} values for {len(files)} data files: give one for each")
            elif values:
                files = [replace(file, **{name: value}) for file, value in zip(files, values, strict=True)]
        faults = faults or list(_faults(files))
        if faults:
            raise SettingError("\n".join(dict.fromkeys(faults)))
        return files

    def select(self, files: Sequence[DataFile], opened: Sequence[Rows]) -> list[Rows]:
        """Return the rows of each file that are taken.

        Weights are the shares of the files in an epoch. No row is repeated: of the file with the fewest rows by its
        weight all are taken, of the others as many as the weights ask for, drawn by the seed."""
        selected = []
        for number, (file, rows) in enumerate(zip(files, opened, strict=True)):
            sampling = Sampling.of(file.sampling or "all")
            places = sampling.places(len(rows), Random(f"{self.seed}:{number}"))
            selected.append(rows if len(places) == len(rows) else SelectedRows(rows, places))
        weights = [Fraction(str(file.weight)) for file in files if file.weight is not None]
        if not weights:
            return selected
        scale = min(len(rows) / weight for rows, weight in zip(selected, weights, strict=True))
        for number, (rows, weight) in enumerate(zip(selected, weights, strict=True)):
            count = min(len(rows), max(1, int(weight * scale)))
            drawn = sorted(Random(f"{self.seed}:{number}:weight").sample(range(len(rows)), count))
            selected[number] = rows if count == len(rows) else _selected_again(rows, drawn)
        return selected


EVERYTHING = Mixture()  # all rows of all files


def listed(name: str) -> list[DataFile]:
    """Return the files of a YAML list, or the file itself; SettingError with every fault of the list."""
    path = Path(name)
    if path.suffix.lower() not in (".yaml", ".yml"):
        return [DataFile(name)]
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"data_file_paths: {name} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise SettingError(f"data_file_paths: {name} is not YAML: {error}") from error
    entries = content.get("datasets") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise SettingError(f"data_file_paths: {name} has no list `datasets` of entries with json_path")
    faults = [fault for number, entry in enumerate(entries, 1) for fault in _entry_faults(entry, f"entry {number}")]
    if set(content) > {"datasets"}:
        faults.append(f"it has {', '.join(sorted(map(str, set(content) - {'datasets'})))} beside datasets")
    if faults:
        raise SettingError("\n".join(f"data_file_paths: {name}: {fault}" for fault in faults))
    return [
        DataFile(each["json_path"], each.get("sampling_strategy"), each.get("weight"), each.get("image_folder"))
        for each in entries
    ]


def describe(sources: Iterable[tuple[Rows, object]]) -> list[str]:
    """Return a line for each file of which not all rows are taken."""
    parts = [rows for rows, _ in sources if isinstance(rows, SelectedRows)]
    return [f"{rows.name}: {len(rows)} of {len(rows.rows)} rows are taken" for rows in parts]


def _selected_again(rows: Rows, places: Sequence[int]) -> Rows:
    if isinstance(rows, SelectedRows):
        return SelectedRows(rows.rows, [rows.places[place] for place in places])
    return SelectedRows(rows, places)


def _faults(files: Sequence[DataFile]) -> Iterator[str]:
    for file in files:
        if file.sampling is not None:
            yield from faults_of(lambda text=file.sampling: Sampling.of(text))
        if file.weight is not None and not (math.isfinite(file.weight) and file.weight > 0):
            yield f"data_weights: the weight of {file.name} is {file.weight}: it must be above 0"
    if 0 < sum(file.weight is not None for file in files) < len(files):
        yield f"data_weights: {next(f.name for f in files if f.weight is None)} has no weight, but other files have"


def _entry_faults(entry: Any, which: str) -> Iterator[str]:
    """Yield what is wrong with an entry of `datasets`."""
    if not isinstance(entry, dict) or "json_path" not in entry:
        yield f"{which} has no json_path"
        return
    for key, value in entry.items():
        if key not in ENTRY:
            yield f"{which} has an unknown key {key!r}; known: {', '.join(ENTRY)}"
        elif not isinstance(value, ENTRY[key]) or isinstance(value, bool):
            yield f"{which}: {key} is {value!r}, not {'a number' if key == 'weight' else 'a text'}"
