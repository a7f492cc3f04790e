"""Published IoU of one box: whole numbers only; for Qwen and InternVL with inclusive pixel edges."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

from vlmr1.rewards.vlm_r1.tags import ANSWER

Family = Literal["qwen", "internvl", "glm"]
FAMILIES: tuple[Family, ...] = get_args(Family)
BOX = re.compile(r"\[(\d+),\s*(\d+),\s*(\d+),\s*(\d+)]")
PATCH = 14  # px of a patch in `image_grid_thw`


def box_iou(family: Family) -> Callable[..., float]:
    """Return the reward of a family: IoU of the first box in the first answer, 0 where it cannot be computed."""
    edge = 0 if family == "glm" else 1

    def score(
        content: str,
        solution: str,
        *,
        image_grid_thw: Sequence[int] | None = None,
        image_size: Sequence[int] | None = None,
        **options: Any,
    ) -> float:
        truth = json.loads(ANSWER.findall(solution)[-1].strip())
        answer = ANSWER.search(content)
        match = BOX.search(answer[1].strip()) if answer else None
        if match is None:
            return 0.0
        if family == "qwen" and (image_grid_thw is None or image_size is None):
            raise TypeError("iou_qwen needs image_grid_thw and image_size: it scales boxes from one to the other")
        try:
            box = [int(number) for number in match.groups()]
            if family == "qwen":
                box = scaled(box, image_grid_thw, image_size)
            return inclusive_iou(box, truth, edge)
        except (ValueError, TypeError, LookupError, ArithmeticError):
            return 0.0

    return score


IOUS = {"iou": box_iou("internvl"), **{f"iou_{family}": box_iou(family) for family in FAMILIES}}


def scaled(box: Sequence[float], grid: Any, size: Any) -> list[float]:
    """Convert a box from px of the model's input, of `grid` (time, rows, columns of patches), to px of the image."""
    sides = int(grid[2] * PATCH), int(grid[1] * PATCH)
    return [number / sides[i % 2] * size[i % 2] for i, number in enumerate(box)]


def inclusive_iou(box: Any, other: Any, edge: int = 1) -> float:
    """Intersection over union with inclusive right and lower edges; an overlap of one pixel counts as none. With an
    `edge` of 0 boxes are continuous."""
    left, top = max(box[0], other[0]), max(box[1], other[1])
    right, bottom = min(box[2] - edge, other[2] - edge), min(box[3] - edge, other[3] - edge)
    overlap = (right - left + edge) * (bottom - top + edge) if left < right and top < bottom else 0
    areas = [(each[2] - each[0]) * (each[3] - each[1]) for each in (box, other)]
    return float(overlap) / (areas[0] + areas[1] - overlap)
