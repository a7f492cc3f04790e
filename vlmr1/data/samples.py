"""Rows -> samples, read on access; every fault of a row is found before training.

A row is in VLM-R1's format, `{"id", "image": str | [str], "conversations": [{"from": "human", "value": "<image>Locate
..."}, {"from": "gpt", "value": "<answer>...</answer>"}], ...}`, or in TRL's, `{"prompt": text | [message], "image" or
"images", "solution", ...}`. Without images it is text only.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

from tqdm import tqdm

from vlmr1.data.faults import row_fault
from vlmr1.data.folder import ImageFolder, image_of, image_values
from vlmr1.data.images import image_faults
from vlmr1.data.messages import as_text, check_template, from_prompt, from_turns
from vlmr1.data.mixture import EVERYTHING, Mixture, describe
from vlmr1.data.rows import Row, Rows
from vlmr1.data.sources import open_sources
from vlmr1.errors import DataError, SettingError
from vlmr1.types import ImageRef, Sample

RESERVED = ("solution", "prompts", "completions", "completion_ids")  # arguments of a reward function

Question = str | Callable[[Row], str]  # a question template, or that of each row
OnFault = Callable[[DataError], None]


def stop(fault: DataError) -> None:
    raise fault


@dataclass(frozen=True)
class Columns:
    """The columns of prompt and solution in rows of TRL's format."""

    prompt: str = "prompt"
    solution: str = "solution"


class Samples(Sequence[Sample]):
    """The rows of several data files as samples, built on each access; no image is held."""

    def __init__(
        self,
        sources: Sequence[tuple[Rows, ImageFolder]],
        question: Question,
        columns: Columns = Columns(),
        indices: Sequence[int] | None = None,
        defaults: Sequence[Mapping[str, Any]] = (),
    ):
        if isinstance(question, str):
            check_template(question)
        self.sources = list(sources)
        self.question = question
        self.columns = columns
        self.defaults = list(defaults)  # one a source, or none: columns for rows that lack them or have null
        self.ends = list(accumulate(len(rows) for rows, _ in sources))
        self.indices: Sequence[int] = range(self.ends[-1]) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self.sample(i) for i in self.indices[index]]
        return self.sample(self.indices[index])

    def sample(self, index: int, on_fault: OnFault = stop) -> Sample:
        """Return the sample with this `Sample.index`. `on_fault` gets the faults of images, which are then left out."""
        rows, folder, place = self._place(index)
        row = rows.read(place)
        if self.defaults:
            defaults = self.defaults[self._file(index)[0]].items()
            row = {**row, **{name: value for name, value in defaults if row.get(name) is None}}
        return self._sample(row, rows.source(place), index, folder, on_fault)

    def source(self, index: int) -> str:
        """ "file:line" of the sample with this `Sample.index`."""
        rows, _, place = self._place(index)
        return rows.source(place)

    def describe(self) -> list[str]:
        """Return the question templates in words, and a line for each file that is read in part."""
        return [str(self.question), *describe(self.sources)]

    def select(self, indices: Sequence[int]) -> Samples:
        """Return the samples with these values of `Sample.index`, in this order."""
        return Samples(self.sources, self.question, self.columns, indices, self.defaults)

    def _place(self, index: int) -> tuple[Rows, ImageFolder, int]:
        file, place = self._file(index)
        return *self.sources[file], place

    def _file(self, index: int) -> tuple[int, int]:
        """Return the file of a `Sample.index`, and the place of the row in it."""
        file = bisect_right(self.ends, index)
        return file, index - (self.ends[file - 1] if file else 0)

    def _sample(self, row: Row, source: str, index: int, folder: ImageFolder, on_fault: OnFault) -> Sample:
        question = self.question if isinstance(self.question, str) else self.question(row)
        values = image_values(row, source)
        if row.get("conversations") is not None or self.columns.prompt not in row:
            used = {"conversations", "image", "images"}
            messages, solution = from_turns(row.get("conversations"), len(values), question, source)
        else:
            used = {self.columns.prompt, self.columns.solution, "image", "images"}
            messages = from_prompt(row[self.columns.prompt], len(values), question, source)
            if row.get(self.columns.solution) is None:
                raise row_fault(source, "solution", f"no solution: the row has no column {self.columns.solution!r}")
            solution = as_text(row[self.columns.solution])
        columns = {key: value for key, value in row.items() if key not in used}
        for name in RESERVED:
            if name in columns:
                what = f"a column cannot be called {name!r}: reward functions get ours by this name"
                raise row_fault(source, "column", what)
        images: list[Any] = []
        for place, value in enumerate(values):
            try:
                images.append(image_of(value, folder, f"{place + 1} of {source}", source))
            except DataError as error:
                on_fault(error)
        return Sample(messages, tuple(images), solution, source, index, columns)


def load_samples(
    data_file_paths: Sequence[str | Path],
    image_folders: Sequence[str | Path],
    *,
    question: Question,
    check_images: bool,
    prompt_column: str = "prompt",
    solution_column: str = "solution",
    checks: Sequence[Callable[[Sample], None]] = (),
    defaults: Sequence[Mapping[str, Any]] = (),
    mixture: Mixture = EVERYTHING,
) -> Samples:
    """Return all rows of all files, in order; `open_sources` lists the kinds of files.

    `question` is a template with `{question}` for the last user turn. `defaults` are columns for the rows of each file
    that lack them. Each row is read once and passed to the `checks`; with `check_images` each distinct image is decoded
    once. DataError "file:line: ..." for the first row with a fault, SettingError for a missing file or folder.
    """
    sources = open_sources(data_file_paths, image_folders, mixture)
    for rows, _ in sources:
        if not len(rows):
            raise DataError(f"{rows.name}: the data set is empty: no rows in this file")
    samples = Samples(sources, question, Columns(prompt_column, solution_column), defaults=defaults)
    check_rows(samples, checks, images=check_images)
    return samples


def check_rows(samples: Sequence[Sample], checks: Sequence[Callable[[Sample], None]], *, images: bool = True) -> None:
    """Read each row, pass it to the checks, and with `images` decode each distinct image once.

    Raise the DataError of the first row with a fault."""
    faults: list[DataError] = []
    every = _checked_images(samples, checks, faults)
    for fault in image_faults(every) if images else (None for _ in every):
        if fault is not None:
            raise fault
    if faults:
        raise faults[0]


def _checked_images(
    samples: Sequence[Sample], checks: Sequence[Callable[[Sample], None]], faults: list[DataError]
) -> Iterator[tuple[ImageRef, str]]:
    """Yield the images of all rows, up to the first row with another fault, which is added to `faults`.

    It is not raised at once: images of earlier rows, still waiting for a decoder, come first."""
    for place in tqdm(range(len(samples)), desc="checking rows", delay=2, disable=None):
        try:
            sample = samples[place]
            for check in checks:
                check(sample)
        except DataError as error:
            faults.append(error)
            return
        yield from ((image, sample.source) for image in sample.images)


def validation_split(samples: Samples, ratio: float, seed: int) -> tuple[Samples, Samples]:
    """Return (train, validation), which has `ratio` of the rows, drawn by the seed and the rows' indices.

    Both have at least one row and keep the order of the files. SettingError where one would be empty."""
    if not 0 < ratio < 1:
        raise SettingError(f"val_split_ratio is {ratio}: it must be above 0 and below 1")
    if len(samples) < 2:
        raise SettingError(f"val_split_ratio is {ratio}: {len(samples)} rows cannot be split")
    count = min(len(samples) - 1, max(1, round(len(samples) * ratio)))
    drawn = sorted(samples.indices, key=lambda index: blake2b(f"{seed}:{index}".encode(), digest_size=8).digest())
    return samples.select(sorted(drawn[count:])), samples.select(sorted(drawn[:count]))
