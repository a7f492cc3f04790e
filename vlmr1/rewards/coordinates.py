"""Boxes of a completion -> pixels of the image file: which coordinates a model writes, and the factor of a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlmr1.errors import DataError, SettingError
from vlmr1.models.image_grid import PatchGrid, Size
from vlmr1.rewards.answer import Scale
from vlmr1.types import Prompt, Sample

if TYPE_CHECKING:
    from vlmr1.models.boxes import Setting, Space

CONVERTED = ("iou", "map", "od_ap", "od_ap50", "odLength", "weighted_sum", "point_in_box")  # methods of accuracy
BOX_REWARDS = ("iou", "point_in_box")
METHOD_REWARDS = ("accuracy", "length")  # boxes or not, by the row's method


def converts(reward: str, method: str) -> bool:
    """Whether a strict reward, with this accuracy method, reads boxes or points that are brought to px of the file."""
    return reward in BOX_REWARDS or (reward in METHOD_REWARDS and method in CONVERTED)


@dataclass(frozen=True)
class BoxCoordinates:
    """What a model's boxes are in: pixels of the file, of the image as its tower sees it, or thousandths of the sides.

    `grid` is the processor's, with `resized`."""

    space: Space = "original"
    grid: PatchGrid | None = None

    @classmethod
    def of(cls, setting: Setting, model_type: str, image_processor: Any) -> BoxCoordinates:
        """`auto` is what `boxes.SPACES` says for the model type. SettingError where the processor has no such size."""
        from vlmr1.models.boxes import space_of

        space = space_of(setting, model_type)
        try:
            return cls(space, PatchGrid.of(image_processor) if space == "resized" else None)
        except SettingError as error:
            raise SettingError(f"box_coordinates is resized, but {error}: give original or thousand") from error

    def scale(self, prompt: Prompt) -> Scale | None:
        """Of the images as the processor made them; None where nothing is converted. DataError as in `check`."""
        if self.space == "original":
            return None
        sample, seen = prompt.sample, []
        if self.grid is not None:
            grids = [image["image_grid_thw"].reshape(3).tolist() for image in prompt.images]
            seen = [(columns * self.grid.patch, rows * self.grid.patch) for _, rows, columns in grids]
        return self._one_scale(sample, seen)

    def check(self, sample: Sample) -> None:
        """DataError for a row whose boxes cannot be brought to px of its file: it has no image, or several that the
        model sees at different scales. Sizes are read from the files only where there are several."""
        if self.space != "original" and len(sample.images) != 1:
            self._one_scale(sample, [])

    def _one_scale(self, sample: Sample, seen: list[Size]) -> Scale:
        """The factor that all images of a row have; `seen` their sizes after the processor, else what it will make."""
        from vlmr1.data.images import upright_size

        sizes = [upright_size(image, sample.source) for image in sample.images]
        extents = [(1000, 1000)] * len(sizes)
        if self.grid is not None:
            extents = seen or [self._resized(size, sample.source) for size in sizes]
        scales = {(w / width, h / height) for (w, h), (width, height) in zip(sizes, extents, strict=True)}
        if len(scales) != 1:
            why = f"its {len(sizes)} images have different scales" if scales else "it has no image"
            raise DataError(
                f"{sample.source}: {why}, so boxes cannot be brought to pixels of the file; with "
                "box_coordinates=original they are compared as they stand"
            )
        return scales.pop()

    def _resized(self, size: Size, source: str) -> Size:
        from vlmr1.data.images import enlarged_size

        assert self.grid is not None
        try:
            return self.grid.resized(enlarged_size(size))
        except ValueError as error:  # an aspect ratio
            raise DataError(f"{source}: the processor refuses the row: {error}") from error
