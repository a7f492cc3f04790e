"""Load the rows of an evaluation, and check each of them before decoding."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmr1.data.faults import row_fault
from vlmr1.data.samples import Samples, check_rows
from vlmr1.data.sources import open_sources, split_names
from vlmr1.errors import DataError
from vlmr1.evaluation.annotations import annotation_rows
from vlmr1.evaluation.options import REWARD_OF, Options
from vlmr1.evaluation.tasks import check_of
from vlmr1.lifecycle.checkpoint import sha256_of_file
from vlmr1.rewards.methods import columns_of_files
from vlmr1.rewards.question import Question
from vlmr1.types import ImageRef


@dataclass(frozen=True)
class Data:
    """The rows of an evaluation, and the sha256 of their content, independent of the question template."""

    samples: Samples
    digest: str

    @classmethod
    def of(cls, samples: Samples) -> Data:
        return cls(samples, rows_digest(samples))


def load_rows(options: Options, model_type: str) -> Data:
    """Return the samples to evaluate, in the order of the files, at most `limit`.

    Every row is read and checked against its task, and each image is decoded once. DataError "file:line: ..." for the
    first fault, SettingError for files and folders that do not exist."""
    sources = open_sources(options.data, options.images)
    columns = options.columns
    opened = [(annotation_rows(rows, columns.prompt, columns.solution), folder) for rows, folder in sources]
    for rows, _ in opened:
        if not len(rows):
            raise DataError(f"{rows.name}: the data set is empty: no rows in this file")
    defaults = columns_of_files(len(split_names(options.data)), options.methods)
    question = Question(options.question_template, [REWARD_OF[options.task]], options.methods[0], model_type)
    every = Samples(opened, question, columns, defaults=defaults)
    samples = every.select(range(min(len(every), options.limit or len(every))))
    several = check_rows(samples, [question.count, check_of(options.task, options.rewards())]).several
    if several and options.task != "vqa":
        what = f"several accepted solutions: --task {options.task} needs one a row, --task vqa takes the best score"
        raise row_fault(several, "solution", what)
    return Data.of(samples)


def rows_digest(samples: Samples) -> str:
    """Return the sha256 over the rows of the samples and the bytes of their images."""
    digest = hashlib.sha256()
    known: dict[ImageRef, str] = {}
    for sample in samples:
        rows, place = samples.place(sample.index)
        digest.update(json.dumps(rows.read(place), sort_keys=True, default=_plain).encode())
        for image in sample.images:
            if image not in known:
                known[image] = sha256_of_file(image) if isinstance(image, Path) else image.key
            digest.update(known[image].encode())
        digest.update(b"\n")
    return digest.hexdigest()


def file_digests(names: Sequence[str]) -> list[dict[str, str | None]]:
    """The data files with their sha256; directories and hub data sets have none, their rows' digest stands for them."""
    return [{"file": name, "sha256": sha256_of_file(Path(name)) if Path(name).is_file() else None} for name in names]


def _plain(value: Any) -> str:
    """A JSON form of other values, such as encoded images."""
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else str(value)
