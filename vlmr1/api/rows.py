"""Rows of `train_dataset` and `eval_dataset` as samples, made when they are asked for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import SequentialSampler

from vlmr1.data.faults import row_fault
from vlmr1.data.folder import ImageFolder, image_of, image_values
from vlmr1.data.formats import read_messages
from vlmr1.data.media import check_tokens
from vlmr1.data.messages import QUESTION, Message, finished, short
from vlmr1.data.rows import ListRows, Row, Rows
from vlmr1.data.samples import RESERVED, OnFault, Samples
from vlmr1.errors import SettingError
from vlmr1.types import ImageRef, Sample

NOT_TOLD = ("prompt", "completion", "completion_ids")  # columns that reward functions do not get


class RowSamples(Samples):
    """Rows in the format of TRL: `prompt`, a list of messages; `image` or `images`; other columns for the rewards."""

    def __init__(self, rows: Rows):
        super().__init__([(rows, ImageFolder(Path()))], QUESTION)

    def _sample(self, row: Row, source: str, index: int, folder: ImageFolder, on_fault: OnFault) -> Sample:
        given, messages, values = read(row, source)
        named = [(f"{place + 1} of {source}", value) for place, value in enumerate(values)]
        images: list[ImageRef] = [image_of(value, folder, name, source, outside=True) for name, value in named]
        told = {name: value for name, value in row.items() if name not in NOT_TOLD}
        columns = {name: value for name, value in told.items() if name not in (*RESERVED, "image", "images")}
        told["prompts"] = _filled(messages, values) if given else row["prompt"]
        solution = _as_text(row.get("solution"))
        return Sample(messages, tuple(images), solution, source, index, columns, as_given=told)


class StreamSamples(RowSamples):
    """Rows that come in an order of their own."""

    def sampler(self, seed: int, buffer_size: int) -> SequentialSampler:
        return SequentialSampler(self)


class StreamRows(Rows):
    """The first `count` rows of a stream. It begins anew where it ends, or where an earlier row is asked for."""

    def __init__(self, name: str, stream: Iterable[Row], count: int):
        self.name = name
        self.stream = stream
        self.count = count
        self._restart()

    def __len__(self) -> int:
        return self.count

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"rows": None, "at": -1, "row": None}

    def _restart(self) -> None:
        self.rows: Iterator[Row] | None = None
        self.at = -1  # place of the row that was read last
        self.row: Row | None = None

    def read(self, index: int) -> Row:
        if index < self.at:
            self._restart()
        while self.at < index:
            self.row = self._next()
            self.at += 1
        assert self.row is not None
        return self.row

    def _next(self) -> Row:
        for _ in range(2):
            if self.rows is None:
                self.rows = iter(self.stream)
            row = next(self.rows, None)
            if row is not None:
                return row
            self.rows = None
        raise SettingError(f"{self.name} has no rows")


def samples_of(data: Any, name: str, needed: int | None = None) -> RowSamples:
    """Return the samples of a data set, a list of rows or a stream, of which `needed` rows are read. The first row is
    checked."""
    rows = rows_of(data, name, needed)
    samples = StreamSamples(rows) if isinstance(rows, StreamRows) else RowSamples(rows)
    samples[0]
    return samples


def rows_of(data: Any, name: str, needed: int | None = None) -> Rows:
    """Return the rows of a data set, of a list, or the first `needed` ones of a stream."""
    if data is None:
        raise SettingError(f"{name} is missing")
    if hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        if not len(data):
            raise SettingError(f"{name} has no rows")
        return ListRows(name, data)
    if not hasattr(data, "__iter__"):
        raise SettingError(f"{name} is neither a data set nor a list of rows but {type(data).__name__}")
    if needed is None:
        raise SettingError(f"{name} is a stream, whose number of rows is not known: set max_steps")
    return StreamRows(name, data, needed)


def read(row: Row, source: str) -> tuple[bool, list[Message], list[Any]]:
    """Return whether a row has images in a column, its messages with places for images, and all images in order."""
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        what = "the prompt is text, and a chat model is trained"
        raise row_fault(source, "prompt", f'{what}: give a list of messages, [{{"role": "user", "content": ...}}]')
    if not isinstance(prompt, Sequence) or not prompt:
        raise row_fault(source, "prompt", f"the column prompt is no list of messages but {short(prompt)}")
    messages = read_messages(prompt, source, markers=False)
    if messages[-1]["role"] != "user":
        what = f"the last message of the prompt is of {messages[-1]['role']}, not of user"
        raise row_fault(source, "turn", what)
    given = image_values(row, source)
    messages, values = finished(messages, given, QUESTION, source)
    check_tokens(messages, source)
    return bool(given), messages, values


def _filled(messages: Sequence[Message], images: Sequence[Any]) -> list[Message]:
    """The messages with their images, as TRL gives them to reward functions."""
    left = iter(images)
    return [
        {**message, "content": [{**p, "image": next(left)} if p["type"] == "image" else p for p in message["content"]]}
        for message in messages
    ]


def _as_text(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False, default=str)
