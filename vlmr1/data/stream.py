"""Rows that are read while training, without a pass over the files before: `streaming`."""

from __future__ import annotations

import os
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count, takewhile
from pathlib import Path
from random import Random
from typing import Any

from torch.utils.data import Sampler

from vlmr1.data.folder import ImageFolder
from vlmr1.data.formats import DEFAULT, Columns
from vlmr1.data.hub import imported, table_row
from vlmr1.data.mixture import DataFile, Mixture, Sampling
from vlmr1.data.rows import LineRows, Row, Rows
from vlmr1.data.samples import OnFault, Question, Samples, stop
from vlmr1.data.sources import image_places, open_rows, split_paths
from vlmr1.errors import DataError, SettingError
from vlmr1.types import Sample

AHEAD = 1000  # lines that are indexed together
GROUPS = 4  # row groups of a Parquet file that are held


class StreamedLines(LineRows):
    """JSON lines whose index grows with the rows that are asked for."""

    def __init__(self, path: Path):
        self.name = str(path)
        self.starts = array("q")
        self.lines = array("q")
        self.size = os.path.getsize(path)
        self.position = (0, 0)  # the bytes and lines that are indexed
        self.is_whole = False

    def __len__(self) -> int:
        raise TypeError(f"{self.name} is streamed: its number of rows is not known")

    def has(self, index: int) -> bool:
        """Return whether there is a row of this number; the index is extended to the row behind it."""
        while len(self.lines) <= index + 1 and not self.is_whole:
            self._extend(index + AHEAD)
        return index < len(self.lines)

    def read(self, index: int) -> Row:
        self.has(index)
        return super().read(index)

    def source(self, index: int) -> str:
        self.has(index)
        return super().source(index)

    def _extend(self, index: int) -> None:
        at, number = self.position
        with Path(self.name).open("rb") as file:
            file.seek(at)
            for line in file:
                number += 1
                if line.strip():
                    self.starts.append(at)
                    self.lines.append(number)
                at += len(line)
                if len(self.lines) > index:
                    break
            else:
                self.is_whole = True
                self.starts.append(at)
        self.position = at, number


class ParquetGroups(Rows):
    """Rows of a Parquet file; a row group is read when a row of it is asked for, and the last ones are held."""

    def __init__(self, path: Path):
        imported(str(path))  # the extra that pyarrow belongs to
        import pyarrow.parquet
        from pyarrow import ArrowException

        self.name = str(path)
        try:
            metadata = pyarrow.parquet.read_metadata(path)
        except (OSError, ArrowException) as error:
            reason = str(error).splitlines()[0]
            raise SettingError(f"data_file_paths: {path} cannot be read: {reason}") from error
        self.sizes = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        self.groups: OrderedDict[int, Any] = OrderedDict()

    def __len__(self) -> int:
        return sum(self.sizes)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"groups": OrderedDict()}

    def read(self, index: int) -> Row:
        number, source = 0, self.source(index)
        while index >= self.sizes[number]:
            index -= self.sizes[number]
            number += 1
        return table_row(self._group(number).slice(index, 1), source)

    def _group(self, number: int) -> Any:
        import pyarrow.parquet

        if number not in self.groups:
            self.groups[number] = pyarrow.parquet.ParquetFile(self.name).read_row_group(number)
            if len(self.groups) > GROUPS:
                self.groups.popitem(last=False)
        self.groups.move_to_end(number)
        return self.groups[number]


class StreamedSamples(Samples):
    """Samples of files whose number of rows is not known. Each row is checked when it is read.

    The `Sample.index` of row i of file f, of n files, is i * n + f."""

    def __init__(
        self,
        files: Sequence[DataFile],
        sources: Sequence[tuple[Rows, ImageFolder]],
        question: Question,
        columns: Columns = DEFAULT,
        defaults: Sequence[Mapping[str, Any]] = (),
        checks: Sequence[Callable[[Sample], None]] = (),
    ):
        self.sources = list(sources)
        self.question = question
        self.columns = columns
        self.defaults = list(defaults)
        self.checks = list(checks)
        self.limits = [Sampling.of(file.sampling or "all").limit for file in files]
        self.weights = [file.weight for file in files if file.weight is not None]

    def __len__(self) -> int:
        raise TypeError("the number of rows of a stream is not known")

    def __getitem__(self, index: Any) -> Any:
        return self.sample(index)

    def __iter__(self) -> Iterator[Sample]:
        raise TypeError("the samples of a stream are read in the order of its sampler")

    def sample(self, index: int, on_fault: OnFault = stop) -> Sample:
        sample = super().sample(index, on_fault)
        for check in self.checks:
            for each in sample.each_solution():
                check(each)
        return sample

    def sampler(self, seed: int, buffer_size: int) -> StreamSampler:
        """Return the order of the samples, without end."""
        return StreamSampler(self, seed=seed, buffer_size=buffer_size)

    def has(self, index: int) -> bool:
        """Return whether there is a sample with this `Sample.index`."""
        file, place = self._file(index)
        limit, rows = self.limits[file], self.sources[file][0]
        if limit is not None and place >= limit:
            return False
        return rows.has(place) if isinstance(rows, StreamedLines) else place < len(rows)

    def indices_of(self, file: int) -> Iterator[int]:
        """Yield the `Sample.index` of each row of a file, in order."""
        return takewhile(self.has, count(file, len(self.sources)))

    def _file(self, index: int) -> tuple[int, int]:
        place, file = divmod(index, len(self.sources))
        return file, place


class StreamSampler(Sampler[int]):
    """The `Sample.index` of rows in the order of a stream, without end.

    Without weights the files follow each other, and start anew after the last one. With weights the file of each row is
    drawn, and a file that ends starts anew. The next row is a random one of a buffer of `buffer_size`. The seed alone
    decides the order: a resumed run skips the rows that it has used."""

    def __init__(self, samples: StreamedSamples, *, seed: int, buffer_size: int):
        self.samples = samples
        self.seed = seed
        self.buffer_size = buffer_size

    def __iter__(self) -> Iterator[int]:
        for turn in count():
            order = self._mixed() if self.samples.weights else self._one_by_one()
            yield from shuffled(order, self.buffer_size, Random(f"{self.seed}:{turn}"))

    def _one_by_one(self) -> Iterator[int]:
        for file in range(len(self.samples.sources)):
            yield from self.samples.indices_of(file)

    def _mixed(self) -> Iterator[int]:
        random, weights = Random(f"{self.seed}:files"), self.samples.weights
        endless = [self._endless(file) for file in range(len(weights))]
        while True:
            yield next(random.choices(endless, weights)[0])

    def _endless(self, file: int) -> Iterator[int]:
        while True:
            yield from self.samples.indices_of(file)


def shuffled(items: Iterable[int], buffer_size: int, random: Random) -> Iterator[int]:
    """Yield the items, each a random one of the next `buffer_size`; in their order with a size of 0."""
    buffer: list[int] = []
    for item in items:
        if len(buffer) < max(1, buffer_size):
            buffer.append(item)
            continue
        place = random.randrange(len(buffer))
        buffer[place], chosen = item, buffer[place]
        yield chosen
    random.shuffle(buffer)
    yield from buffer


def stream_samples(
    names: Sequence[str],
    image_folders: Sequence[str],
    mixture: Mixture,
    **options: Any,
) -> StreamedSamples:
    """Return the samples of data files, of which the first row of each is read and checked.

    `options` are those of `StreamedSamples`. SettingError for files that cannot be streamed."""
    files = mixture.files(split_paths(names))
    rows = [open_stream(file.name) for file in files]
    sources = list(zip(rows, image_places(files, image_folders), strict=True))
    samples = StreamedSamples(files, sources, **options)
    for number, (each, _) in enumerate(sources):
        if not samples.has(number):
            raise DataError(f"{each.name}: the data set is empty: no rows in this file")
        samples.sample(number)
    return samples


def open_stream(name: str) -> Rows:
    """Open a file or a directory of save_to_disk to read rows on demand."""
    path = Path(name)
    if path.is_file() and path.suffix.lower() == ".parquet":
        return ParquetGroups(path)
    if path.is_file() and path.suffix.lower() == ".jsonl":
        return StreamedLines(path)
    if path.is_file() or not Path(name.partition("@")[0]).is_dir():
        raise SettingError(
            f"data_file_paths: {name} cannot be streamed: streaming reads .jsonl and .parquet files and directories of "
            "save_to_disk"
        )
    return open_rows(name)
