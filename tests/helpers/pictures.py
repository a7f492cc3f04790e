"""Image files made by hand."""

import io
import struct
import zlib

from PIL import ExifTags, Image


def encoded(size=(40, 30), colour=(200, 90, 10), kind="PNG", orientation=1):
    """The bytes of a file of one colour."""
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.Orientation] = orientation
    Image.new("RGB", size, colour).save(buffer, kind, exif=exif)
    return buffer.getvalue()


def png_of(width, height):
    """A PNG that says that it has this size, and holds next to nothing."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0" * 9))]
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in [*chunks, (b"IEND", b"")]
    )
    return b"\x89PNG\r\n\x1a\n" + body
