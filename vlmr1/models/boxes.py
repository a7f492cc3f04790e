"""Box coordinates: what a family of models writes <-> pixels of the image file."""

from __future__ import annotations

from typing import Any, Literal

from vlmr1.data.grid import PatchGrid, Size
from vlmr1.errors import SettingError

Box = tuple[float, float, float, float]  # x1, y1, x2, y2
Space = Literal["resized", "thousand", "original"]

# By model type: pixels of the image as the tower sees it, thousandths of its sides, or pixels of the file.
SPACES: dict[str, Space] = {
    "qwen2_vl": "resized",
    "qwen2_5_vl": "resized",
    "qwen3_vl": "thousand",
    "internvl": "thousand",
    "glm4v": "thousand",
    "idefics3": "original",
    "smolvlm": "original",
}


def to_original(box: Box, family: str, original_size: Size, resized_size: Size) -> Box:
    """(x1 w/W, y1 h/H, x2 w/W, y2 h/H): a box in the coordinates of `family`, a model type, -> pixels of the file.

    w, h is `original_size`; W, H is `resized_size`, 1000, or w, h. Nothing is rounded or clipped.
    SettingError for a family whose coordinates are not known."""
    return _scaled(box, extent(family, original_size, resized_size), original_size)


def from_original(box: Box, family: str, original_size: Size, resized_size: Size) -> Box:
    """(x1 W/w, y1 H/h, x2 W/w, y2 H/h): the inverse of `to_original`."""
    return _scaled(box, original_size, extent(family, original_size, resized_size))


def extent(family: str, original_size: Size, resized_size: Size) -> Size:
    """The coordinates of the lower right corner of an image."""
    if family not in SPACES:
        raise SettingError(f"no box coordinates are known for {family}; there are for {', '.join(SPACES)}")
    space = SPACES[family]
    return {"resized": resized_size, "thousand": (1000, 1000), "original": original_size}[space]


def resized_size(image_processor: Any, size: Size) -> Size:
    """The size to which a patch-grid processor (Qwen2-VL's, GLM-4V's) brings an image of this one.

    Sides are multiples of patch_size * merge_size, the area between the processor's bounds. SettingError for a
    processor that does not resize so; ValueError for an aspect ratio above 200, as the processor raises it."""
    return PatchGrid.of(image_processor).resized(size)


def grid_size(grid: Any, patch_size: int) -> Size:
    """The size that a processed image has, from its `image_grid_thw` [3] or [1, 3] in patches."""
    _, rows, columns = (int(number) for number in grid.reshape(3))
    return columns * patch_size, rows * patch_size


def _scaled(box: Box, before: Size, after: Size) -> Box:
    x1, y1, x2, y2 = box
    return (
        x1 * after[0] / before[0],
        y1 * after[1] / before[1],
        x2 * after[0] / before[0],
        y2 * after[1] / before[1],
    )
