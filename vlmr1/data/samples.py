"""Rows -> samples, read on access; every fault of a row is found before training. `formats.py` has the formats of rows.

A row without images is text only. Columns that are neither prompt, images nor solution go to the reward functions.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

from tqdm import tqdm

from vlmr1.data.faults import row_fault
from vlmr1.data.folder import ImageFolder, image_of, image_values
from vlmr1.data.formats import DEFAULT, Columns, read_row, with_system
from vlmr1.data.grounding import fill
from vlmr1.data.images import image_faults, upright_size
from vlmr1.data.media import Tally, check_tokens, check_unread, check_videos
from vlmr1.data.messages import check_template, finished
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


class Samples(Sequence[Sample]):
    """The rows of several data files as samples, built on each access; no image is held."""

    tally: Tally | None = None  # counts of a check of every row

    def __init__(
        self,
        sources: Sequence[tuple[Rows, ImageFolder]],
        question: Question,
        columns: Columns = DEFAULT,
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

    def place(self, index: int) -> tuple[Rows, int]:
        """Return the file of the sample with this `Sample.index`, and its place there."""
        rows, _, place = self._place(index)
        return rows, place

    def describe(self) -> list[str]:
        """Return the question templates in words, and a line for each file that is read in part."""
        return [str(self.question), *describe(self.sources)]

    def select(self, indices: Sequence[int]) -> Samples:
        """Return the samples with these values of `Sample.index`, in this order."""
        chosen = copy(self)
        chosen.indices = indices
        return chosen

    def _place(self, index: int) -> tuple[Rows, ImageFolder, int]:
        file, place = self._file(index)
        return *self.sources[file], place

    def _file(self, index: int) -> tuple[int, int]:
        """Return the file of a `Sample.index`, and the place of the row in it."""
        file = bisect_right(self.ends, index)
        return file, index - (self.ends[file - 1] if file else 0)

    def _sample(self, row: Row, source: str, index: int, folder: ImageFolder, on_fault: OnFault) -> Sample:
        def image(place: int, value: Any) -> ImageRef:
            return image_of(value, folder, f"{place + 1} of {source}", source, outside=self.columns.images_outside)

        def size(place: int) -> tuple[int, int]:
            if place not in range(len(values)):
                raise row_fault(source, "objects", f"image_id of objects is {place!r}: there are {len(values)} images")
            return upright_size(image(place, values[place]), source)

        question = self.question if isinstance(self.question, str) else self.question(row)
        check_videos(row, source)
        values = image_values(row, source, self.columns.image)
        reading = fill(read_row(row, self.columns, source), row.get("objects"), size, source)
        messages = with_system(reading.messages, self.columns.system_prompt)
        messages, placed = finished(messages, values, question, source)
        check_tokens(messages, source)
        used = reading.used | ({self.columns.image} if self.columns.image else {"image", "images"})
        columns = {key: value for key, value in row.items() if key not in used}
        for name in RESERVED:
            if name in columns:
                what = f"a column cannot be called {name!r}: reward functions get ours by this name"
                raise row_fault(source, "column", what)
        if not placed:
            check_unread(columns, source)
        images: list[ImageRef] = []
        for place, value in enumerate(placed):
            try:
                images.append(image(place, value))
            except DataError as error:
                on_fault(error)
        first, *others = reading.solutions
        return Sample(messages, tuple(images), first, source, index, columns, tuple(others))


def load_samples(
    data_file_paths: Sequence[str | Path],
    image_folders: Sequence[str | Path],
    *,
    question: Question,
    check_images: bool,
    columns: Columns = DEFAULT,
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
    samples = Samples(sources, question, columns, defaults=defaults)
    samples.tally = check_rows(samples, checks, images=check_images)
    return samples


def check_rows(samples: Sequence[Sample], checks: Sequence[Callable[[Sample], None]], *, images: bool = True) -> Tally:
    """Read each row, pass it to the checks, and with `images` decode each distinct image once. Return the counts.

    Raise the DataError of the first row with a fault."""
    faults: list[DataError] = []
    tally = Tally()
    every = _checked_images(samples, checks, faults, tally)
    for fault in image_faults(every) if images else (None for _ in every):
        if fault is not None:
            raise fault
    if faults:
        raise faults[0]
    return tally


def _checked_images(
    samples: Sequence[Sample], checks: Sequence[Callable[[Sample], None]], faults: list[DataError], tally: Tally
) -> Iterator[tuple[ImageRef, str]]:
    """Yield the images of all rows, up to the first row with another fault, which is added to `faults`; count the rows.

    It is not raised at once: images of earlier rows, still waiting for a decoder, come first."""
    for place in tqdm(range(len(samples)), desc="checking rows", delay=2, disable=None, leave=False):
        try:
            sample = samples[place]
            for check in checks:
                for each in sample.each_solution():
                    check(each)
            tally.add(sample)
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
