"""Images in reports: encoded at a small size, and kept on disk where they have no file of their own."""

from __future__ import annotations

import io
from base64 import b64encode
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vlmr1.data.images import UNDECODABLE, to_rgb
from vlmr1.lifecycle.checkpoint import replace_bytes
from vlmr1.lifecycle.disk import guard_writes
from vlmr1.report.html import Shape
from vlmr1.types import ImageBytes, ImageRef

LARGEST = 448  # px of a side; larger images are shown smaller
QUALITY = 85  # of JPEG
CRISP_BELOW = 256  # px; a smaller image is shown enlarged, its pixels left visible


@dataclass(frozen=True)
class Picture:
    """An image in a page, as a data URI, with rectangles over it."""

    uri: str
    size: tuple[int, int]  # width and height in px of the upright original, which the rectangles refer to
    crisp: bool  # shown with visible pixels
    shapes: tuple[Shape, ...] = ()


def data_uri(data: bytes, mime_type: str) -> str:
    return f"data:{mime_type};base64,{b64encode(data).decode()}"


def small(image: Path | bytes) -> tuple[bytes, str, tuple[int, int]]:
    """Return the upright image with sides of at most `LARGEST` px: its bytes, "png" or "jpeg", and its original size.

    Raises one of UNDECODABLE for a file that is not an image."""
    with Image.open(image if isinstance(image, Path) else io.BytesIO(image)) as opened:
        pixels = to_rgb(opened)
    size = pixels.size
    return *encoded(pixels), size


def encoded(pixels: Image.Image) -> tuple[bytes, str]:
    """Shrink the image in place to sides of at most `LARGEST` px; return its bytes and "png" (lossless) or "jpeg"."""
    pixels.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    kind = "png" if max(pixels.size) < CRISP_BELOW else "jpeg"
    buffer = io.BytesIO()
    pixels.save(buffer, kind, **({"quality": QUALITY} if kind == "jpeg" else {}))
    return buffer.getvalue(), kind


def keep_picture(image: ImageRef, folder: Path) -> dict[str, Any] | None:
    """Write a small copy of an image that has no file, once; return its place and original size. None for a file."""
    if not isinstance(image, ImageBytes):
        return None
    data, kind, size = small(image.data)
    path = folder / f"{image.key}.{kind}"
    if not path.exists():
        with guard_writes(folder.name, folder.parent):
            folder.mkdir(parents=True, exist_ok=True)
            replace_bytes(path, data)
    return {"file": f"{folder.name}/{path.name}", "size": list(size)}


def read_picture(path: Path, size: tuple[int, int] | None = None) -> Picture | None:
    """Return the image of a file, or None where it cannot be decoded; `size` is the original's where it is a copy."""
    try:
        data, kind, own = small(path)
    except (*UNDECODABLE, Image.DecompressionBombError):
        return None
    size = own if size is None else size
    return Picture(data_uri(data, f"image/{kind}"), size, max(size) < CRISP_BELOW)
