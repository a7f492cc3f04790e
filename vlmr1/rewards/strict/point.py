"""GUI grounding: whether a click is inside the right element."""

from __future__ import annotations

from typing import Any

from vlmr1.data.boxes import Scale
from vlmr1.rewards.answer import box_text, parse_point
from vlmr1.rewards.strict.iou import true_box


def point_in_box(content: str, solution: str, *, box_scale: Scale | None = None, **options: Any) -> float:
    """Return 1 where the answer's point, converted by `box_scale`, is in the solution's box, edges included, else 0.

    Click accuracy, as in ScreenSpot (SeeClick, arXiv:2401.10935) and GUI-R1 (arXiv:2504.10458).
    """
    x1, y1, x2, y2 = true_box(solution)
    text = box_text(content)
    point = None if text is None else parse_point(text)
    if point is None:
        return 0.0
    x, y = point if box_scale is None else (point[0] * box_scale[0], point[1] * box_scale[1])
    return float(x1 <= x <= x2 and y1 <= y <= y2)
