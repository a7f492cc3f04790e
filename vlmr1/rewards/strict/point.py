"""GUI grounding: whether a click is inside the right element."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from vlmr1.data.boxes import Scale
from vlmr1.rewards.answer import FENCE, find_answer, parse_box
from vlmr1.rewards.strict.iou import true_box

NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
POINT = re.compile(rf"\({NUMBER},{NUMBER}\)|\[{NUMBER},{NUMBER}\]|{NUMBER},{NUMBER}")


def point_in_box(content: str, solution: str, *, box_scale: Scale | None = None, **options: Any) -> float:
    """Return 1 where the answer's point, converted by `box_scale`, is in the solution's box, edges included, else 0.

    Click accuracy, as in ScreenSpot (SeeClick, arXiv:2401.10935) and GUI-R1 (arXiv:2504.10458).
    """
    x1, y1, x2, y2 = true_box(solution)
    answer = find_answer(content)
    point = None if answer is None else parse_point(answer)
    if point is None:
        return 0.0
    x, y = point if box_scale is None else (point[0] * box_scale[0], point[1] * box_scale[1])
    return float(x1 <= x <= x2 and y1 <= y <= y2)


def parse_point(text: str) -> tuple[float, float] | None:
    """Parse `{"point_2d": [x, y]}`, `[x, y]`, `(x, y)` or `x, y`; the point of a box is its center."""
    box = parse_box(text)
    if box is not None:
        return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    fenced = FENCE.fullmatch(text.strip())
    text = (fenced[1] if fenced else text).strip()
    if match := POINT.fullmatch(text):
        x, y = (float(number) for number in match.groups() if number is not None)
        return (x, y) if math.isfinite(x) and math.isfinite(y) else None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, dict):
        return None
    inner = value.get("point_2d", value.get("point"))
    return parse_point(json.dumps(inner)) if isinstance(inner, list) else None
