"""An image of a row -> RGB pixels, as the model sees them: upright, opaque, 8 bits a channel, at least 28 px a side."""

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

IN_FLIGHT = 64  # images that wait for a decoder
MIN_SIDE = 28  # px: a merged patch of Qwen's towers; VLM-R1 enlarges smaller images to it too
MAX_PIXELS = 178_956_970  # of an enlarged image; PIL refuses files that have more
# What PIL's decoders raise for a file that is truncated or corrupt.
UNDECODABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    TypeError,
    RuntimeError,
    struct.error,
    zlib.error,
)
UPRIGHT = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)  # of those: width and height change places


def encode_image(image: Image.Image, name: str) -> ImageBytes:
    """Lossless bytes of an open image, as `open_image` would return it."""
    buffer = io.BytesIO()
    to_rgb(image).save(buffer, "PNG", compress_level=1)
    return ImageBytes.of(buffer.getvalue(), name)


def open_image(image: ImageRef, source: str) -> Image.Image:
    """The decoded image in RGB, by its EXIF orientation, over white where it is transparent, 16 bits scaled to 8, the
    short side enlarged to `MIN_SIDE` where it is less.

    Raises a DataError that begins with `source` where it cannot be decoded, or has more pixels than PIL's limit."""
    with _faults(image, source), _opened(image) as file:
        return enlarged(to_rgb(file))


def upright_size(image: ImageRef, source: str) -> tuple[int, int]:
    """(width, height) of the image in px, by its EXIF orientation, before it is enlarged; its pixels are not decoded.

    Raises as `open_image`."""
    with _faults(image, source):
        return _size_of_file(image) if isinstance(image, Path) else _size(image)


@lru_cache(maxsize=100_000)
def _size_of_file(image: Path) -> tuple[int, int]:
    return _size(image)


def _size(image: ImageRef) -> tuple[int, int]:
    with _opened(image) as file:
        turned = file.format != "TIFF" and orientation(file) in SIDEWAYS  # a TIFF's size is that of the turned one
        return (file.height, file.width) if turned else file.size


def _opened(image: ImageRef) -> Image.Image:
    return Image.open(image if isinstance(image, Path) else io.BytesIO(image.data))


@contextmanager
def _faults(image: ImageRef, source: str) -> Iterator[None]:
    """What is raised in the block, because the image cannot be decoded, becomes a DataError of `source`."""
    try:
        yield
    except Image.DecompressionBombError as error:
        raise row_fault(source, "image too large", f"image {image} cannot be decoded: {error}") from error
    except UNDECODABLE as error:
        raise row_fault(source, "image undecodable", f"image {image} cannot be decoded: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB, upright. ValueError where it is not known what range the values have."""
    image.load()  # a TIFF turns itself here
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
    """Grey values of 0..65535, or floats of 0..1, -> 8 bits, rounded."""
    values = np.asarray(image).astype(np.float64)  # [H, W]
    full = 1.0 if image.mode == "F" else 65535.0
    if not (values.min() >= 0 and values.max() <= full):  # NaN compares false
        raise ValueError(f"values from {values.min():g} to {values.max():g} in mode {image.mode}, not 0 to {full:g}")
    return Image.fromarray(np.rint(values * (255 / full)).astype(np.uint8))


def orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 where there is none that can be read."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except UNDECODABLE:  # the pixels are there all the same
        return 1


def enlarged_size(size: tuple[int, int], least: int = MIN_SIDE) -> tuple[int, int]:
    """(width, height) with the short side at least `least`, the aspect ratio kept."""
    short = min(size)
    return size if short >= least else (size[0] * least // short, size[1] * least // short)


def enlarged(image: Image.Image) -> Image.Image:
    """The image with its short side at least `MIN_SIDE` px."""
    size = enlarged_size(image.size)
    if size[0] * size[1] > MAX_PIXELS:
        raise Image.DecompressionBombError(f"{image.width} x {image.height} px enlarged to {size[0]} x {size[1]}")
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


def image_faults(images: Iterable[tuple[ImageRef, str]]) -> Iterator[RowFault | None]:
    """Decodes each distinct image once, in threads (PIL decodes without the GIL): a fault or None for each of them, in
    their order. Not more than `IN_FLIGHT` are held at a time."""
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
