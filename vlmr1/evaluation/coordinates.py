"""What the coordinates of a model's boxes mean on an image."""

from __future__ import annotations

from typing import Any

from vlmr1.errors import SettingError
from vlmr1.models.boxes import Setting, Size, Space, extent, grid_size, space_of
from vlmr1.types import Prompt


class BoxSpace:
    """The coordinates in which a model writes boxes: those of an image's lower right corner are its extent."""

    def __init__(self, setting: Setting, model: Any):
        self.model_type: str = model.config.model_type
        self.space: Space = space_of(setting, self.model_type)
        self.patch_size = getattr(getattr(model.config, "vision_config", None), "patch_size", None)

    def extent(self, prompt: Prompt, original: Size) -> Size:
        """Of the first image of a prompt, whose file has the upright size `original`: the size that the processor
        really made, 1000 x 1000, or that of the file."""
        return extent(self.space, original, self._resized(prompt) if self.space == "resized" else original)

    def _resized(self, prompt: Prompt) -> Size:
        grid = prompt.images[0].get("image_grid_thw")
        if grid is None or not isinstance(self.patch_size, int):
            raise SettingError(
                f"--box_coordinates resized: {self.model_type} cuts images into tiles, it has no resized image"
            )
        return grid_size(grid, self.patch_size)
