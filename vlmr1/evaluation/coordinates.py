"""From the coordinates in which a model writes boxes to pixels of the upright image file."""

from __future__ import annotations

from typing import Any

from vlmr1.errors import SettingError
from vlmr1.models.boxes import SPACES, Box, Size, Space, grid_size
from vlmr1.rewards.answer import in_pixels
from vlmr1.rewards.coordinates import Setting
from vlmr1.types import Prompt

Coordinates = Setting
THOUSAND = (1000, 1000)


def space_of(coordinates: Coordinates, model_type: str) -> Space:
    """The coordinates that are asked for; `auto` is what is known of the model type, or a SettingError."""
    if coordinates != "auto":
        return coordinates
    if model_type not in SPACES:
        known = ", ".join(SPACES)
        raise SettingError(
            f"--box_coordinates auto: it is not known how {model_type} writes boxes, only of {known}: "
            "give original, resized or thousand"
        )
    return SPACES[model_type]


class BoxSpace:
    """What the coordinates of a model's boxes mean on an image: `extent` is those of its lower right corner."""

    def __init__(self, coordinates: Coordinates, model: Any):
        self.model_type: str = model.config.model_type
        self.space = space_of(coordinates, self.model_type)
        self.patch_size = getattr(getattr(model.config, "vision_config", None), "patch_size", None)

    def extent(self, prompt: Prompt, original: Size) -> Size:
        """Of the first image of a prompt, whose file has the upright size `original`: the size that the processor
        really made, 1000 x 1000, or that of the file."""
        if self.space == "thousand":
            return THOUSAND
        if self.space == "original":
            return original
        grid = prompt.images[0].get("image_grid_thw")
        if grid is None or not isinstance(self.patch_size, int):
            raise SettingError(
                f"--box_coordinates resized: {self.model_type} cuts images into tiles, it has no resized image"
            )
        return grid_size(grid, self.patch_size)


def to_pixels(box: Box, extent: Size, original: Size) -> Box:
    """(x1 w/W, y1 h/H, x2 w/W, y2 h/H) for an `extent` of (W, H) and a file of (w, h) px; not rounded, not clipped."""
    if tuple(extent) == tuple(original):
        return box
    return in_pixels(box, (original[0] / extent[0], original[1] / extent[1]))


def from_pixels(box: Box, extent: Size, original: Size) -> Box:
    """The inverse of `to_pixels`."""
    return to_pixels(box, original, extent)
