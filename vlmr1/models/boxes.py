"""Box coordinates: what a family of models writes <-> pixels of the image file."""

from __future__ import annotations

from typing import Any, Literal

from vlmr1.errors import SettingError
from vlmr1.models.image_grid import Size

Box = tuple[float, float, float, float]  # x1, y1, x2, y2
Space = Literal["resized", "thousand", "original"]
Setting = Literal["auto", "original", "resized", "thousand"]  # box_coordinates

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


def space_of(setting: Setting, model_type: str) -> Space:
    """The coordinates that `box_coordinates` asks for; `auto` is what is known of the model type, or a SettingError."""
    if setting != "auto":
        return setting
    if model_type not in SPACES:
        raise SettingError(
            f"box_coordinates is auto, but it is not known how {model_type} writes boxes, only how {', '.join(SPACES)} "
            "do: give original, resized or thousand"
        )
    return SPACES[model_type]


def extent(space: Space, original: Size, resized: Size) -> Size:
    """The coordinates (W, H) of the lower right corner of an image."""
    return {"resized": resized, "thousand": (1000, 1000), "original": original}[space]


def to_original(box: Box, extent: Size, original: Size) -> Box:
    """(x1 w/W, y1 h/H, x2 w/W, y2 h/H): from an `extent` of (W, H) to a file of (w, h) px; not rounded, not clipped."""
    if tuple(extent) == tuple(original):
        return box
    (x1, y1, x2, y2), x, y = box, original[0] / extent[0], original[1] / extent[1]
    return x1 * x, y1 * y, x2 * x, y2 * y


def from_original(box: Box, extent: Size, original: Size) -> Box:
    """The inverse of `to_original`."""
    return to_original(box, original, extent)


def grid_size(grid: Any, patch_size: int) -> Size:
    """The size that a processed image has, from its `image_grid_thw` [3] or [1, 3] in patches."""
    _, rows, columns = (int(number) for number in grid.reshape(3))
    return columns * patch_size, rows * patch_size
