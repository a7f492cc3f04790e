"""What a row holds of its images: names of files in a folder, encoded bytes, or open images."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from PIL import Image

from vlmr1.data.faults import row_fault
from vlmr1.data.images import encode_image
from vlmr1.data.rows import Row
from vlmr1.types import ImageBytes, ImageRef


class ImageFolder:
    """Finds image files by name; what leaves the folder is refused. Without a folder no name is found."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        self.root = os.path.realpath(folder) if folder else ""

    def find(self, name: str, source: str) -> Path:
        if self.folder is None:
            raise row_fault(source, "missing image", f"image {name} is a file name, and image_folders names no folder")
        if "\0" in name:
            raise row_fault(source, "image name", f"image {name!r} is not a file name")
        path = os.path.realpath(os.path.join(self.root, name))
        if path != self.root and not path.startswith(os.path.join(self.root, "")):
            raise row_fault(source, "image outside", f"image {name} leaves the image folder {self.folder}")
        if not os.path.isfile(path):
            raise row_fault(source, "missing image", f"image {name} is missing in {self.folder}")
        return Path(path)


def image_values(row: Row, source: str) -> list[Any]:
    """What the row holds of its images, in either of the two columns."""
    values = [row[name] for name in ("image", "images") if row.get(name) is not None]
    if len(values) > 1:
        raise row_fault(source, "image name", "there is both a column image and a column images")
    if not values:
        return []
    every = values[0] if isinstance(values[0], list) else [values[0]]
    if not all(_is_image(value) for value in every):
        raise row_fault(source, "image name", "image is neither a file name nor a list of file names, nor image data")
    return every


def image_of(value: Any, folder: ImageFolder, name: str, source: str) -> ImageRef:
    """The image of one such value; `name` stands for it in messages where it has none."""
    if isinstance(value, dict):
        name = value.get("path") or name
        value = value["path"] if value["bytes"] is None else value["bytes"]
    if isinstance(value, str):
        return folder.find(value, source)
    if isinstance(value, bytes):
        return ImageBytes.of(value, name)
    try:
        return encode_image(value, name)
    except (OSError, ValueError) as error:
        raise row_fault(source, "image undecodable", f"image {name} cannot be read: {error}") from error


def _is_image(value: Any) -> bool:
    if isinstance(value, dict):  # as `datasets` stores images
        data, path = value.get("bytes"), value.get("path")
        return isinstance(data, bytes) or ("bytes" in value and data is None and isinstance(path, str))
    return isinstance(value, str | bytes | Image.Image)
