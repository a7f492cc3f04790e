"""The size to which processors of patch grids (Qwen-VL, GLM-4V) resize an image. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vlmr1.data.boxes import Size
from vlmr1.errors import SettingError


@dataclass(frozen=True)
class PatchGrid:
    """A resizing to sides that are multiples of `patch * merge` and an area within bounds; the aspect ratio is kept.

    Bounds are in px. GLM-4V's processor bounds the area of an image's `frames` together."""

    patch: int  # px
    merge: int
    shortest: int
    longest: int
    frames: int | None = None  # GLM-4V only: an image is one frame, repeated

    @classmethod
    def of(cls, image_processor: Any) -> PatchGrid:
        """Read the grid of an image processor. SettingError for a processor that does not resize to one."""
        name = type(image_processor).__name__
        patch, merge = (getattr(image_processor, name, None) for name in ("patch_size", "merge_size"))
        shortest, longest = (image_processor.size.get(name) for name in ("shortest_edge", "longest_edge"))
        if not patch or not merge or shortest is None or longest is None:
            raise SettingError(f"{name} does not resize images to a grid of merged patches")
        frames = image_processor.temporal_patch_size if name.startswith("Glm4v") else None
        return cls(patch, merge, shortest, longest, frames)

    def resized(self, size: Size) -> Size:
        """Return the resized size of an image. ValueError for an aspect ratio above 200."""
        width, height = size
        factor = self.patch * self.merge
        if self.frames is not None:
            from transformers.models.glm4v.image_processing_pil_glm4v import smart_resize as glm_resize

            new = glm_resize(self.frames, height, width, self.frames, factor, self.shortest, self.longest)
        else:
            from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

            new = smart_resize(height, width, factor, self.shortest, self.longest)
        return new[1], new[0]
