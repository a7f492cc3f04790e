"""Strict IoU of one box, the score of referring expressions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlmr1.data.boxes import Box, Scale, iou, scale_between, scale_box
from vlmr1.rewards.answer import predicted_box, solution_box

PATCH = 14  # px of a patch in `image_grid_thw`: that of Qwen2-VL and Qwen2.5-VL, for every model


def rec_iou(content: str, solution: str, *, box_scale: Scale | None = None, **options: Any) -> float:
    """Return the IoU of the answer's box, in px of the file by `box_scale`, with the solution's; 0 without one."""
    box = predicted_box(content)
    truth = true_box(solution)
    return 0.0 if box is None else iou(scale_box(box, box_scale), truth)


def plain_iou(content: str, solution: str, **options: Any) -> float:
    """Return the IoU of the two boxes as written, whatever their coordinates; 0 where the completion has none."""
    return rec_iou(content, solution)


def scaled_iou(
    content: str,
    solution: str,
    *,
    image_grid_thw: Sequence[int] | None = None,
    image_size: Sequence[int] | None = None,
    **options: Any,
) -> float:
    """Return the IoU of a box in px of the model's input with one in px of the image.

    `image_grid_thw` (time, rows, columns of patches) is the input's size, `image_size` (width, height) the image's."""
    if image_grid_thw is None or image_size is None:
        raise ValueError("iou_qwen needs the columns image_grid_thw and image_size: it scales boxes to the image")
    box, truth = predicted_box(content), true_box(solution)
    if box is None:
        return 0.0
    seen = image_grid_thw[2] * PATCH, image_grid_thw[1] * PATCH
    return iou(scale_box(box, scale_between(seen, image_size)), truth)


def true_box(solution: str) -> Box:
    """Return the box of a solution. ValueError where it has none with an area."""
    truth = solution_box(solution)
    if truth is None:
        error = ValueError(f"the solution has no box: {solution[:120]!r}")
        error.add_note('it must hold {"bbox_2d": [x1, y1, x2, y2]} with an area')
        raise error
    return truth
