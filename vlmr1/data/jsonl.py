"""VLM-R1's JSONL files -> samples; every fault is found here, before any training time is spent.

A row is `{"id", "image": str | [str], "conversations": [{"from": "human", "value": "<image>Locate ..."},
{"from": "gpt", "value": "<answer>...</answer>"}], ...}`; without `image` it is text only. The first human
turn is the question, the first gpt turn the solution.
"""

from __future__ import annotations

import json
import os
import re
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from vlmr1.errors import DataError, SettingError
from vlmr1.types import Sample

MARKER = "<image>"
LEADING_MARKERS = re.compile(rf"(?:\s*{MARKER})*\s*")
RESERVED = ("solution", "prompts", "completions", "completion_ids")  # arguments of a reward function
# What PIL's decoders raise for a file that is truncated, corrupt, or larger than its safety limit.
UNDECODABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def load_samples(
    data_file_paths: Sequence[str | Path],
    image_folders: Sequence[str | Path],
    *,
    question: str,
    check_images: bool,
) -> list[Sample]:
    """All rows of all files, in order. One image folder serves all files, or there is one for each.

    `question` is a text with `{question}` in it; the human turn takes that place. With `check_images` each
    distinct image is decoded once. Raises DataError "file:line: what is wrong", or SettingError for a file or
    folder that does not exist.
    """
    folders = _folders(data_file_paths, image_folders)
    if "{question}" not in question or MARKER in question:
        raise SettingError(f"question_template is {question!r}: it must hold {{question}}, and no {MARKER}")
    samples: list[Sample] = []
    for file, folder in zip(data_file_paths, folders, strict=True):
        before = len(samples)
        images = _Images(folder)
        for source, row in _rows(file):
            samples.append(_sample(row, source, len(samples), images, question))
        if len(samples) == before:
            raise DataError(f"{file}: the data set is empty: no rows in this file")
    if check_images:
        _check_images(samples)
    return samples


def open_image(path: Path, source: str) -> Image.Image:
    """The decoded image in RGB; a DataError that begins with `source` where it cannot be decoded."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except UNDECODABLE as error:
        raise DataError(f"{source}: image {path} cannot be decoded: {error}") from error


def _folders(files: Sequence[str | Path], folders: Sequence[str | Path]) -> list[Path]:
    """One existing image folder for each file."""
    if not files:
        raise SettingError("data_file_paths is empty: name at least one JSONL file")
    if len(folders) not in (1, len(files)):
        raise SettingError(
            f"image_folders has {len(folders)} folders for {len(files)} data files: give one for all, or one for each"
        )
    for file in files:
        if not Path(file).is_file():
            raise SettingError(f"data_file_paths: {file} is not a file")
    for folder in folders:
        if not Path(folder).is_dir():
            raise SettingError(f"image_folders: {folder} is not a directory")
    return [Path(folder) for folder in folders] * (len(files) if len(folders) == 1 else 1)


def _rows(file: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, row) of each line that is not blank."""
    with Path(file).open("rb") as lines:  # bytes, so that a line that is not UTF-8 can be named
        for number, line in enumerate(lines, start=1):
            source = f"{file}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                row = json.loads(text) if text.strip() else None
            except UnicodeDecodeError as error:
                raise DataError(f"{source}: not UTF-8: {error.reason} at byte {error.start}") from error
            except (ValueError, RecursionError) as error:
                reason = str(error).replace(": line 1 column", " at column")
                raise DataError(f"{source}: not JSON: {reason}") from error
            if not text.strip():
                continue
            if not isinstance(row, dict):
                raise DataError(f"{source}: not a JSON object but {_kind(row)}")
            yield source, row


def _sample(row: dict[str, Any], source: str, index: int, images: _Images, question: str) -> Sample:
    human, solution = _turns(row, source)
    names = row.get("image")
    names = [] if names is None else [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{source}: image is neither a file name nor a list of file names")
    for name in RESERVED:
        if name in row:
            raise DataError(f"{source}: a column cannot be called {name!r}: reward functions get ours by this name")
    return Sample(
        messages=[{"role": "user", "content": _content(human, len(names), question, source)}],
        images=tuple(images.find(name, source) for name in names),
        solution=solution,
        source=source,
        index=index,
        columns={key: value for key, value in row.items() if key not in ("image", "conversations")},
    )


def _turns(row: Mapping[str, Any], source: str) -> tuple[str, str]:
    """The first human turn and the first gpt turn, as text."""
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{source}: no conversations: a row needs a list with a human and a gpt turn")
    first: dict[str, Any] = {}
    for turn in turns:
        if not isinstance(turn, dict) or "value" not in turn or turn.get("from") not in ("human", "gpt"):
            raise DataError(f'{source}: a turn is {{"from": "human" or "gpt", "value": ...}}, not {_short(turn)}')
        first.setdefault(turn["from"], turn["value"])
    for name in ("human", "gpt"):
        if first.get(name) is None:
            raise DataError(f"{source}: no {name} turn in conversations")
    if not isinstance(first["human"], str):
        raise DataError(f"{source}: the human turn is not text but {_kind(first['human'])}")
    solution = first["gpt"]  # some files hold the bare JSON value there
    return first["human"], solution if isinstance(solution, str) else json.dumps(solution, ensure_ascii=False)


def _content(human: str, num_images: int, question: str, source: str) -> list[dict[str, str]]:
    """Parts of the user message. Images stand where their markers are; those that the text begins with, and
    all images of a text without markers, come before the question and its template."""
    markers = human.count(MARKER)
    if markers not in (0, num_images):
        raise DataError(f"{source}: {markers} {MARKER} markers in the human turn for {num_images} images")
    match = LEADING_MARKERS.match(human)
    start = match.end() if match else 0
    leading = human[:start].count(MARKER) if markers else num_images
    text = question.replace("{question}", human[start:].rstrip())
    content = [{"type": "image"} for _ in range(leading)]
    for place, piece in enumerate(text.split(MARKER)):
        if place:
            content.append({"type": "image"})
        if piece:
            content.append({"type": "text", "text": piece})
    if not content:
        raise DataError(f"{source}: the human turn is empty")
    return content


class _Images:
    """Finds the images of one folder; each distinct name is resolved once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.root = os.path.realpath(folder)
        self.inside = os.path.join(self.root, "")
        self.found: dict[str, Path] = {}

    def find(self, name: str, source: str) -> Path:
        if name not in self.found:
            if "\0" in name:
                raise DataError(f"{source}: image {name!r} is not a file name")
            path = os.path.realpath(os.path.join(self.root, name))
            if path != self.root and not path.startswith(self.inside):
                raise DataError(f"{source}: image {name} leaves the image folder {self.folder}")
            if not os.path.isfile(path):
                raise DataError(f"{source}: image {name} is missing in {self.folder}")
            self.found[name] = Path(path)
        return self.found[name]


def _check_images(samples: Sequence[Sample]) -> None:
    """Decodes each distinct image once; the first fault in the order of the rows is raised."""
    first: dict[Path, str] = {}
    for sample in samples:
        for path in sample.images:
            first.setdefault(path, sample.source)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:  # PIL decodes without the GIL
        checks = pool.map(lambda item: open_image(*item).close(), first.items())
        for _ in tqdm(checks, total=len(first), desc="checking images", delay=2, disable=None):
            pass


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
