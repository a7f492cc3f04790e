"""Geometry of axis-aligned boxes: area, IoU, and coordinates of one image size in those of another."""

from __future__ import annotations

from collections.abc import Sequence

Box = tuple[float, float, float, float]  # x1, y1, x2, y2
Size = tuple[int, int]  # width, height
Scale = tuple[float, float]  # factors of x and of y


def area(box: Box) -> float:
    """Return (x2 - x1)(y2 - y1), or 0 for an inverted box."""
    x1, y1, x2, y2 = box
    return max(0.0, x2 - x1) * max(0.0, y2 - y1)


def iou(a: Box, b: Box) -> float:
    """Return the intersection over union of two continuous boxes; 0 if one of them has no area."""
    inner = area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    if inner == 0 or area(a) == 0 or area(b) == 0:
        return 0.0
    return inner / (area(a) + area(b) - inner)


def scale_between(source: Sequence[float], target: Sequence[float]) -> Scale:
    """Return the factors from coordinates of an image of size `source` to those of the image at size `target`."""
    return target[0] / source[0], target[1] / source[1]


def scale_box(box: Box, scale: Sequence[float] | None) -> Box:
    """Return (x1 sx, y1 sy, x2 sx, y2 sy), neither rounded nor clipped; without a scale the box itself."""
    if scale is None:
        return box
    (sx, sy), (x1, y1, x2, y2) = scale, box
    return x1 * sx, y1 * sy, x2 * sx, y2 * sy


def to_xywh(box: Box) -> list[float]:
    """Return x1, y1, width, height; an inverted box has no width or height."""
    x1, y1, x2, y2 = box
    return [x1, y1, max(0.0, x2 - x1), max(0.0, y2 - y1)]
