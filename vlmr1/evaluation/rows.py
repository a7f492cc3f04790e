"""The rows of an evaluation, each one checked before anything is decoded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vlmr1.data.faults import row_fault
from vlmr1.data.rows import Rows
from vlmr1.data.samples import Columns, Samples, check_rows
from vlmr1.data.sources import open_sources, split_names
from vlmr1.data.templates import question_text
from vlmr1.errors import DataError
from vlmr1.evaluation.annotations import annotation_rows
from vlmr1.evaluation.detection import check_detection
from vlmr1.evaluation.options import Options
from vlmr1.evaluation.vqa import check_answer
from vlmr1.rewards.methods import columns_of_files
from vlmr1.rewards.settings import RewardSettings
from vlmr1.rewards.strict.iou import true_box
from vlmr1.types import ImageRef, Sample

Check = Callable[[Sample], None]


@dataclass(frozen=True)
class Data:
    """The rows of an evaluation, and the sha256 of what they say, whatever words the question template adds."""

    samples: Sequence[Sample]
    digest: str


def load_rows(options: Options, model_type: str) -> Data:
    """The samples to evaluate, in the order of the files, the first `limit` of them.

    Every row is read, checked against its task, and its images decoded once; the first fault is a DataError that
    begins with "file:line". SettingError for files and folders that do not exist."""
    sources = open_sources(options.data, options.images)
    columns = Columns(options.prompt_column, options.solution_column)
    opened = [(annotation_rows(rows, columns.prompt, columns.solution), folder) for rows, folder in sources]
    for rows, _ in opened:
        if not len(rows):
            raise DataError(f"{rows.name}: the data set is empty: no rows in this file")
    defaults = columns_of_files(len(split_names(options.data)), options.methods)
    every = Samples(opened, question_text(options.template, model_type), columns, defaults=defaults)
    samples: Sequence[Sample] = every.select(range(min(len(every), options.limit or len(every))))
    check_rows(samples, [check_of(options.task, options.rewards())])
    return Data(samples, rows_digest([rows for rows, _ in opened], samples))


def check_of(task: str, rewards: RewardSettings) -> Check:
    """What raises a DataError for a row that the task cannot score."""
    if task == "vqa":
        return partial(check_answer, settings=rewards)
    return partial(check_boxes, task=task)


def check_boxes(sample: Sample, task: str) -> None:
    """A DataError for a row of rec or ovd without a true box or list of boxes, or with other than one image."""
    if len(sample.images) != 1:
        raise row_fault(
            sample.source, "images", f"--task {task} needs one image a row, this one has {len(sample.images)}"
        )
    if task == "ovd":
        check_detection(sample)
        return
    try:
        true_box(sample.solution)
    except ValueError as error:
        raise row_fault(sample.source, "solution", str(error)) from error


def rows_digest(files: Sequence[Rows], samples: Sequence[Sample]) -> str:
    """sha256 over the rows of these files as far as there are samples, and over the bytes of their images."""
    digest = hashlib.sha256()
    known: dict[ImageRef, str] = {}
    every = (rows.read(place) for rows in files for place in range(len(rows)))
    for row, sample in zip(every, samples, strict=False):
        digest.update(json.dumps(row, sort_keys=True, default=_plain).encode())
        for image in sample.images:
            if image not in known:
                known[image] = sha256(image) if isinstance(image, Path) else image.key
            digest.update(known[image].encode())
        digest.update(b"\n")
    return digest.hexdigest()


def file_digests(names: Sequence[str]) -> list[dict[str, str | None]]:
    """The data files with their sha256; directories and hub data sets have none, their rows' digest stands for them."""
    return [{"file": name, "sha256": sha256(Path(name)) if Path(name).is_file() else None} for name in names]


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _plain(value: Any) -> str:
    """What JSON has no form for, encoded images above all."""
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else str(value)
