"""Decode images to upright, opaque RGB with 8 bits a channel and at least 28 px a side."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from vlmr1.data.faults import RowFault, row_fault
from vlmr1.types import ImageBytes, ImageRef

IN_FLIGHT = 64  # images waiting for a decoder
MIN_SIDE = 28  # px: a merged patch of Qwen's towers; VLM-R1 enlarges smaller images to it too
MAX_PIXELS = 178_956_970  # maximum area of an enlarged image, and of a file in PIL
# Exceptions of PIL's decoders for a truncated or corrupt file.
UNDECODABLE = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, RuntimeError)
UNDECODABLE += (struct.error, zlib.error)
UPRIGHT = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)  # orientations that swap width and height


def encode_image(image: Image.Image, name: str) -> ImageBytes:
    """Lossless bytes of an open image, as `open_image` would return it."""
    buffer = io.BytesIO()
    to_rgb(image).save(buffer, "PNG", compress_level=1)
    return ImageBytes.of(buffer.getvalue(), name)


def open_image(image: ImageRef, source: str) -> Image.Image:
    """Return the decoded image in RGB: upright, over white where transparent, 16 bits scaled to 8.

    A short side below `MIN_SIDE` is enlarged to it. DataError, beginning with `source`, for an image that cannot be
    decoded or exceeds PIL's limit of pixels."""
    with _faults(image, source), _opened(image) as file:
        return enlarged(to_rgb(file))


def upright_size(image: ImageRef, source: str) -> tuple[int, int]:
    """Return (width, height) of the upright image in px, before it is enlarged, without decoding its pixels.

    DataError as in `open_image`."""
    with _faults(image, source):
        return _size_of_file(image) if isinstance(image, Path) else _size(image)


@lru_cache(maxsize=100_000)
def _size_of_file(image: Path) -> tuple[int, int]:
    return _size(image)


def _size(image: ImageRef) -> tuple[int, int]:
    with _opened(image) as file:
        turned = file.format != "TIFF" and orientation(file) in SIDEWAYS  # PIL has turned a TIFF already
        return (file.height, file.width) if turned else file.size


def _opened(image: ImageRef) -> Image.Image:
    return Image.open(image if isinstance(image, Path) else io.BytesIO(image.data))


@contextmanager
def _faults(image: ImageRef, source: str) -> Iterator[None]:
    """Convert exceptions of decoders in the block to a DataError of `source`."""
    try:
        yield
    except Image.DecompressionBombError as error:
        raise row_fault(source, "image too large", f"image {image} cannot be decoded: {error}") from error
    except UNDECODABLE as error:
        raise row_fault(source, "image undecodable", f"image {image} cannot be decoded: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to upright RGB. ValueError where the range of the values is unknown."""
    image.load()  # PIL turns a TIFF here
    turn = UPRIGHT.get(orientation(image))
    if image.mode.startswith(("I", "F")):
        image = from_wide(image)
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        image = Image.new("RGBA", image.size, "white")
        image.alpha_composite(layers)
    image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def from_wide(image: Image.Image) -> Image.Image:
    """Convert grey values of 0..65535, or floats of 0..1, to 8 bits, rounded."""
    values = np.asarray(image).astype(np.float64)  # [H, W]
    full = 1.0 if image.mode == "F" else 65535.0
    if not (values.min() >= 0 and values.max() <= full):  # NaN compares false
        raise ValueError(f"values from {values.min():g} to {values.max():g} in mode {image.mode}, not 0 to {full:g}")
    return Image.fromarray(np.rint(values * (255 / full)).astype(np.uint8))


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 where none can be read."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except UNDECODABLE:  # the pixels can be read all the same
        return 1


def enlarged_size(size: tuple[int, int], least: int = MIN_SIDE) -> tuple[int, int]:
    """Return (width, height) with the short side at least `least` and the aspect ratio kept."""
    short = min(size)
    return size if short >= least else (size[0] * least // short, size[1] * least // short)


def enlarged(image: Image.Image) -> Image.Image:
    """The image with its short side at least `MIN_SIDE` px."""
    size = enlarged_size(image.size)
    if size[0] * size[1] > MAX_PIXELS:
        raise Image.DecompressionBombError(f"{image.width} x {image.height} px enlarged to {size[0]} x {size[1]}")
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


def image_faults(images: Iterable[tuple[ImageRef, str]]) -> Iterator[RowFault | None]:
    """Decode each distinct image once, in threads (PIL releases the GIL); yield a fault or None for each, in order.

    At most `IN_FLIGHT` images are held at a time."""
    seen: set[Path | str] = set()
    waiting: deque[Future[RowFault | None]] = deque()
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for image, source in images:
            key = image if isinstance(image, Path) else image.key
            if key in seen:
                continue
            seen.add(key)
            waiting.append(pool.submit(_image_fault, image, source))
            if len(waiting) >= IN_FLIGHT:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _image_fault(image: ImageRef, source: str) -> RowFault | None:
    try:
        open_image(image, source).close()
    except RowFault as error:
        return error
    return None
