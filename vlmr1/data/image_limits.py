"""Limits on the pixels or tiles of an image, set in the model's processor and saved with it."""

from __future__ import annotations

from typing import Any

from vlmr1.data.image_grid import PatchGrid
from vlmr1.errors import SettingError


def limit_images(
    processor: Any,
    model_type: str,
    *,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    max_anyres_num: int | None = None,
) -> None:
    """Change the image processor; None keeps the checkpoint's value.

    `min_pixels` and `max_pixels` bound the area of an image, in px, for processors of patch grids (Qwen-VL, GLM-4V).
    `max_anyres_num` bounds the number of tiles without the thumbnail, for InternVL. SettingError for a processor
    without that limit, or where the minimum is above the maximum."""
    image_processor = processor.image_processor
    if min_pixels is not None or max_pixels is not None:
        _limit_area(image_processor, model_type, min_pixels, max_pixels)
    if max_anyres_num is not None:
        _limit_tiles(image_processor, model_type, max_anyres_num)


def _limit_area(image_processor: Any, model_type: str, least: int | None, most: int | None) -> None:
    name = "max_pixels" if least is None else "min_pixels"
    try:
        grid = PatchGrid.of(image_processor)
    except SettingError as error:
        other = "; its tiles are bounded by max_anyres_num" if hasattr(image_processor, "max_patches") else ""
        raise SettingError(f"{name} cannot be set for {model_type}: {error}{other}") from error
    frames = grid.frames or 1  # GLM-4V bounds the area of an image's frames together
    shortest = grid.shortest if least is None else least * frames
    longest = grid.longest if most is None else most * frames
    if shortest > longest:
        raise SettingError(
            f"{name} is {least or most}: min_pixels, {shortest // frames}, is above max_pixels, {longest // frames}"
        )
    image_processor.size = type(image_processor.size)(shortest_edge=shortest, longest_edge=longest)


def _limit_tiles(image_processor: Any, model_type: str, most: int) -> None:
    least = getattr(image_processor, "min_patches", None)
    if least is None or not hasattr(image_processor, "max_patches"):
        raise SettingError(
            f"max_anyres_num cannot be set for {model_type}: {type(image_processor).__name__} has no number of tiles"
        )
    if most < least:
        raise SettingError(f"max_anyres_num is {most}: the checkpoint's processor makes at least {least} tiles")
    image_processor.max_patches = most
