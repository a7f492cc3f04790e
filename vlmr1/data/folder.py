"""The images of a row: names of files in a folder or archive, encoded bytes, or open images."""

from __future__ import annotations

import base64
import binascii
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlparse

from PIL import Image

from vlmr1.data.archives import SUFFIXES, UNREADABLE, is_archive, read_member
from vlmr1.data.faults import row_fault
from vlmr1.data.formats import value_of
from vlmr1.data.images import encode_image
from vlmr1.data.media import is_encoded
from vlmr1.data.messages import IMAGE_KEYS, short
from vlmr1.data.rows import Row
from vlmr1.types import ImageBytes, ImageRef

SCHEME = re.compile(r"([a-z][a-z0-9+.-]+):(?=//)", re.IGNORECASE)
IN_ARCHIVE = re.compile(rf"(.*?(?:{'|'.join(map(re.escape, SUFFIXES))}))/(.+)", re.IGNORECASE | re.DOTALL)
OUTSIDE = "images_outside_folders"  # the setting


class ImageFolder:
    """Find images by name in a directory, or in a ZIP or TAR file.

    A name that leaves the directory, through `..` or a link, is refused, unless `outside` allows it."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        self.root = os.path.realpath(folder) if folder else ""

    def find(self, name: str, source: str, *, outside: bool = False) -> ImageRef:
        """Return the image file, or the bytes of one in an archive. DataError where there is none."""
        if "\0" in name:
            raise row_fault(source, "image name", f"image {name!r} is not a file name")
        if self.folder is None and not (outside and os.path.isabs(name)):
            what = f"image {brief(name)} is a file name, and image_folders names no folder"
            raise row_fault(source, "missing image", what)
        if is_archive(self.root):
            return self._member(self.root, name, name, source)
        path = os.path.realpath(os.path.join(self.root, name))
        if not outside and path != self.root and not path.startswith(os.path.join(self.root, "")):
            what = f"image {brief(name)} leaves the image folder {self.folder}; {OUTSIDE}=true allows it"
            raise row_fault(source, "image outside", what)
        if os.path.isfile(path):
            return Path(path)
        inside = IN_ARCHIVE.fullmatch(path)
        if inside and is_archive(inside[1]):
            return self._member(inside[1], inside[2], name, source)
        raise row_fault(
            source, "missing image", f"image {brief(name)} is missing in {self.folder or 'the file system'}"
        )

    def _member(self, archive: str, member: str, name: str, source: str) -> ImageBytes:
        try:
            data = read_member(archive, member)
        except UNREADABLE as error:
            raise row_fault(source, "archive", f"image {brief(name)} in {archive} cannot be read: {error}") from error
        if data is None:
            raise row_fault(source, "missing image", f"image {brief(name)} is missing in {archive}")
        return ImageBytes.of(data, f"{archive}/{member}")


def image_values(row: Row, source: str, column: str = "") -> list[Any]:
    """Return the values of the column, by default of `image` or `images`."""
    found = {name: value_of(row, name) for name in ([column] if column else ["image", "images"])}
    values = [value for value in found.values() if value is not None]
    if len(values) > 1:
        raise row_fault(source, "image name", "there is both a column image and a column images")
    every = values[0] if values and isinstance(values[0], list) else values
    for value in every:
        check_image(value, source)
    return every


def check_image(value: Any, source: str) -> None:
    """DataError for a value that can be no image."""
    if not isinstance(unwrapped(value), str | bytes | Image.Image):
        what = "image is neither a file name nor a list of file names, nor image data"
        raise row_fault(source, "image name", f"{what}, but {short(value)}")


def image_of(value: Any, folder: ImageFolder, name: str, source: str, *, outside: bool = False) -> ImageRef:
    """Convert one value to an image; `name` stands for it in messages where it has none."""
    check_image(value, source)
    if isinstance(value, dict) and isinstance(value.get("path"), str):
        name = value["path"]
    value = unwrapped(value)
    if isinstance(value, str):
        value = _named(value, source)
    if isinstance(value, str):
        return folder.find(value, source, outside=outside)
    if isinstance(value, bytes):
        return ImageBytes.of(value, name)
    try:
        return encode_image(value, name)
    except (OSError, ValueError) as error:
        raise row_fault(source, "image undecodable", f"image {name} cannot be read: {error}") from error


def unwrapped(value: Any) -> Any:
    """Return what a dict holds as its image: bytes before a path, as `datasets`, chat templates and verl store them."""
    while isinstance(value, dict):
        order = ("bytes", *(key for key in IMAGE_KEYS if key not in ("bytes", "path")), "path")
        value = next((value[key] for key in order if value.get(key) is not None), None)
    return value


def brief(name: str) -> str:
    """A file name for messages."""
    return name if len(name) <= 200 else f"{name[:80]}... ({len(name)} characters)"


def _named(text: str, source: str) -> str | bytes:
    """Return the bytes that a text holds in base64, or the file name that it is. DataError for other addresses."""
    if is_encoded(text):
        return _decoded(text, source)
    if text[:5].lower() == "data:":
        head, _, data = text.partition(",")
        if not head.lower().startswith("data:image/"):
            raise row_fault(source, "image name", f"image {brief(text)} is a data URI of another type than image/...")
        return _decoded(data, source) if head.lower().endswith(";base64") else unquote_to_bytes(data)
    scheme = SCHEME.match(text)
    if scheme is None:
        return text
    if scheme[1].lower() == "file":
        return os.fsdecode(unquote_to_bytes(urlparse(text).path))
    what = f"image {brief(text)} is a URL: images are not fetched; save it in image_folders and name the file"
    raise row_fault(source, "image url", what)


def _decoded(text: str, source: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise row_fault(source, "image undecodable", f"image {brief(text)} is not base64: {error}") from error
