"""Images of logged completions: made small, and kept where they have no file of their own."""

from __future__ import annotations

import io
from base64 import b64encode
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vlmr1.data.images import UNDECODABLE, to_rgb
from vlmr1.lifecycle.checkpoint import replace_bytes
from vlmr1.lifecycle.disk import writing
from vlmr1.report.html import CRISP_BELOW
from vlmr1.types import ImageBytes, ImageRef

LARGEST = 448  # px of a side; larger images are shown smaller
QUALITY = 85  # of JPEG


@dataclass(frozen=True)
class Picture:
    """An image to be shown: its data URI, the size of the upright original, and whether it is small."""

    uri: str
    size: tuple[int, int]  # width, height in px; what boxes refer to
    crisp: bool


def small(image: Path | bytes) -> tuple[bytes, str, tuple[int, int]]:
    """The upright image with sides of at most `LARGEST` px: encoded, "png" or "jpeg", and its size before.

    Raises one of UNDECODABLE for what is no image."""
    with Image.open(image if isinstance(image, Path) else io.BytesIO(image)) as opened:
        pixels = to_rgb(opened)
    size = pixels.size
    return *encoded(pixels), size


def encoded(pixels: Image.Image) -> tuple[bytes, str]:
    """The image with sides of at most `LARGEST` px: encoded, and "png" or "jpeg"; small ones keep every pixel. It is
    made smaller in place."""
    pixels.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    kind = "png" if max(pixels.size) < CRISP_BELOW else "jpeg"
    buffer = io.BytesIO()
    pixels.save(buffer, kind, **({"quality": QUALITY} if kind == "jpeg" else {}))
    return buffer.getvalue(), kind


def keep_picture(image: ImageRef, folder: Path) -> dict[str, Any] | None:
    """Write an image that has no file, small, once; returns where it is and what size it had. None for a file."""
    if not isinstance(image, ImageBytes):
        return None
    data, kind, size = small(image.data)
    path = folder / f"{image.key}.{kind}"
    if not path.exists():
        with writing(folder.name, folder.parent):
            folder.mkdir(parents=True, exist_ok=True)
            replace_bytes(path, data)
    return {"file": f"{folder.name}/{path.name}", "size": list(size)}


def read_picture(path: Path, size: tuple[int, int] | None = None) -> Picture | None:
    """The image of a file, or None where there is none that can be decoded; `size` where the file is a smaller copy."""
    try:
        data, kind, own = small(path)
    except (*UNDECODABLE, Image.DecompressionBombError):
        return None
    size = own if size is None else size
    return Picture(f"data:image/{kind};base64,{b64encode(data).decode()}", size, max(size) < CRISP_BELOW)
