"""Media that a row has and that are not read: videos, columns that look like images, image tokens in the text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from vlmr1.data.faults import row_fault
from vlmr1.data.messages import MARKER, Message
from vlmr1.data.rows import Row
from vlmr1.types import Sample

NOT_TRAINED = ("video", "videos", "audio", "audios")
NAMES = re.compile(
    r"(?:image|img|picture|pic|photo|screenshot)s?(?:_?(?:path|file|filename|name|url|uri|data|bytes|base64|b64)s?)?",
    re.IGNORECASE,
)
SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".jfif", ".avif", ".heic")
SUFFIXES += (".mp4", ".avi", ".mov", ".mkv", ".webm")
# Base64 of the first bytes of PNG, JPEG, GIF, WebP, BMP and TIFF files.
ENCODED = re.compile(r"\s*(?:iVBORw0KGgo|/9j/|R0lGOD|UklGR|Qk[0-3]|SUkqA|TU0AK)[A-Za-z0-9+/=\s]{40}")
# Tokens by which chat templates of the model families stand for images and videos.
TOKENS = re.compile(
    r"<\|(?:vision_start|vision_end|vision_pad|image_pad|video_pad|image|video|image_\d+"
    r"|(?:begin|end)_of_(?:image|video))\|>"
    r"|<IMG_CONTEXT>|<fake_token_around_image>|<image_soft_token>|<start_of_image>|<video>"
)


def check_videos(row: Row, source: str) -> None:
    """DataError for a row with a video or a sound."""
    for name in NOT_TRAINED:
        if row.get(name):
            raise row_fault(source, "video", f"the row has a column {name!r}: only text and images are trained on")


def check_tokens(messages: Sequence[Message], source: str, where: str = "the prompt") -> None:
    """DataError for text that holds a model's token of an image or a video."""
    for part in (part for each in messages for part in each["content"]):
        found = TOKENS.search(part.get("text", ""))
        if found and found[0] == "<video>":
            raise row_fault(source, "video", f"<video> in {where}: only text and images are trained on")
        if found:
            what = f"{found[0]} in {where}: the chat template adds such tokens; write {MARKER} for an image"
            raise row_fault(source, "image token", what)


def unread_media(columns: Row) -> list[str]:
    """Return the names of columns that look like images or videos."""
    return [name for name, value in columns.items() if _is_media(value, bool(NAMES.fullmatch(name)))]


def check_unread(columns: Row, source: str) -> None:
    """DataError for a row without an image of which a column looks like one."""
    for name in unread_media(columns):
        what = f"column {name!r} looks like an image and the row has no other: name it with image_column, or rename it"
        raise row_fault(source, "unread image", what)


def is_encoded(text: str) -> bool:
    """Return whether a text is an image file in base64."""
    return ENCODED.match(text) is not None


@dataclass
class Tally:
    """Counts of rows with images, and each file's columns that look like images and are not read."""

    rows: int = 0
    with_images: int = 0
    unread: dict[tuple[str, str], None] = field(default_factory=dict)  # (file, column), in order
    several: str = ""  # the first row with several accepted solutions

    def add(self, sample: Sample) -> None:
        self.rows += 1
        self.with_images += bool(sample.images)
        self.several = self.several or (sample.source if sample.other_solutions else "")
        file = sample.source.rpartition(":")[0]
        self.unread |= {(file, name): None for name in unread_media(sample.columns)}

    def lines(self, rows: int | None = None) -> list[str]:
        """The text, a line a fact. `rows` counts those that could not be read too."""
        unread = [f"{file}: column {name!r} looks like an image and is not read" for file, name in self.unread]
        return [*unread, f"{self.with_images} of {self.rows if rows is None else rows} rows have images"]


def _is_media(value: Any, named: bool) -> bool:
    if isinstance(value, list):
        return any(_is_media(each, named) for each in value)
    if isinstance(value, dict):
        return value.get("bytes") is not None or _is_media(value.get("path"), named)
    if not isinstance(value, str):
        return isinstance(value, bytes | Image.Image)
    text = value.strip()
    return bool(text) and (
        named or text.lower().endswith(SUFFIXES) or text.startswith(("data:image/", "data:video/")) or is_encoded(text)
    )
