"""The coordinates in which a model writes boxes, and the factors from them to pixels of the image file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from vlmr1.data.boxes import Box, Scale, Size, box_fault, scale_between
from vlmr1.data.image_grid import PatchGrid
from vlmr1.data.images import enlarged_size, upright_size
from vlmr1.errors import DataError, SettingError
from vlmr1.types import Prompt, Sample

Space = Literal["resized", "thousand", "original"]
Setting = Literal["auto", "original", "resized", "thousand"]  # box_coordinates

# By model type: pixels of the image as the tower sees it, thousandths of its sides, or pixels of the file. The table
# "Box coordinates" of docs/rewards.md has the source of each.
SPACES: dict[str, Space] = {
    "qwen2_vl": "thousand",
    "qwen2_5_vl": "resized",
    "qwen3_vl": "thousand",
    "internvl": "thousand",
    "glm4v": "thousand",
    "idefics3": "original",
    "smolvlm": "original",
}


def space_of(setting: Setting, model_type: str) -> Space:
    """Return the coordinates for `box_coordinates`. SettingError where it is `auto` and the model type is unknown."""
    if setting != "auto":
        return setting
    if model_type not in SPACES:
        raise SettingError(
            f"box_coordinates is auto, but it is not known how {model_type} writes boxes, only how {', '.join(SPACES)} "
            "do: give original, resized or thousand"
        )
    return SPACES[model_type]


@dataclass(frozen=True)
class BoxCoordinates:
    """A model's coordinates. `grid` is the resizing of its image processor, with `resized` only.

    `pixels`: boxes of solutions are in pixels of the file. With `box_coordinates=original` they may be in others."""

    space: Space = "original"
    grid: PatchGrid | None = None
    pixels: bool = False

    @classmethod
    def of(cls, setting: Setting, model_type: str, image_processor: Any) -> BoxCoordinates:
        """Resolve `box_coordinates` for a model. SettingError where its processor has no such size."""
        space = space_of(setting, model_type)
        try:
            grid = PatchGrid.of(image_processor) if space == "resized" else None
            return cls(space, grid, pixels=setting != "original")
        except SettingError as error:
            raise SettingError(f"box_coordinates is resized, but {error}: give original or thousand") from error

    def extents(self, prompt: Prompt) -> list[Size]:
        """Return the coordinates of the lower right corner of each image, as the processor has made it."""
        if self.grid is not None:
            grids = [image["image_grid_thw"].reshape(3).tolist() for image in prompt.images]
            return [(columns * self.grid.patch, rows * self.grid.patch) for _, rows, columns in grids]
        return self._expected_extents(prompt.sample)

    def scale(self, prompt: Prompt) -> Scale | None:
        """Return the factors from the model's boxes to pixels of the file; None where nothing is converted.

        Raises DataError as `check` does."""
        return None if self.space == "original" else _common_scale(prompt.sample, self.extents(prompt))

    def check(self, sample: Sample) -> None:
        """Raise DataError for a row whose boxes have no single scale: it has no image, or several of different scales.

        Sizes are read from the files only where there are several."""
        if self.space != "original" and len(sample.images) != 1:
            _common_scale(sample, self._expected_extents(sample))

    def check_truth(self, sample: Sample, boxes: Sequence[Box], *, converted: bool = True) -> None:
        """Raise DataError for a box of the solution that cannot be one. Those of a reward that compares numbers as they
        are written are not `converted`, and need not be in pixels."""
        pixels = self.pixels and converted
        sizes = list(_readable_sizes(sample)) if pixels and boxes else []
        for box in boxes:
            if fault := box_fault(box, sizes, pixels=pixels):
                numbers = ", ".join(f"{number:g}" for number in box)
                hint = "; with box_coordinates=original boxes are compared as written" if pixels else ""
                raise DataError(f"{sample.source}: the box [{numbers}] of the solution: {fault}{hint}")

    def _expected_extents(self, sample: Sample) -> list[Size]:
        """The extents before the processor has run."""
        if self.space == "thousand":
            return [(1000, 1000)] * len(sample.images)
        sizes = [upright_size(image, sample.source) for image in sample.images]
        if self.grid is None:
            return sizes
        try:
            return [self.grid.resized(enlarged_size(size)) for size in sizes]
        except ValueError as error:  # the aspect ratio
            raise DataError(f"{sample.source}: the processor refuses the row: {error}") from error


def _readable_sizes(sample: Sample) -> Iterator[Size]:
    """The sizes of the images, without one that cannot be read: opening it raises the error."""
    for image in sample.images:
        with suppress(DataError):
            yield upright_size(image, sample.source)


def _common_scale(sample: Sample, extents: Sequence[Size]) -> Scale:
    sizes = [upright_size(image, sample.source) for image in sample.images]
    scales = {scale_between(extent, size) for extent, size in zip(extents, sizes, strict=True)}
    if len(scales) != 1:
        why = f"its {len(sizes)} images have different scales" if scales else "it has no image"
        raise DataError(
            f"{sample.source}: {why}, so boxes cannot be converted to pixels of the file; with "
            "box_coordinates=original they are compared as written"
        )
    return scales.pop()
