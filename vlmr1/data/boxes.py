"""Geometry of axis-aligned boxes: area, IoU, and coordinates of one image size in those of another."""

from __future__ import annotations

from collections.abc import Sequence

Box = tuple[float, float, float, float]  # x1, y1, x2, y2
Size = tuple[int, int]  # width, height
Scale = tuple[float, float]  # factors of x and of y
OUTSIDE = 2  # px that a box may leave its image by: annotations round, and some count the last pixel


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


def box_fault(box: Box, sizes: Sequence[Size], *, pixels: bool) -> str | None:
    """Return what is wrong with the box of a solution, and the likely cause; None for a possible box.

    With `pixels` it must be at least a pixel wide and high, and within one of the images of these sizes, if any."""
    x1, y1, x2, y2 = box
    if x2 < x1 or y2 < y1:
        axis = "x" if x2 < x1 else "y"
        return f"{axis}2 is below {axis}1: perhaps it is x, y, width, height; it must be x1, y1, x2, y2"
    if not pixels:
        return None
    if min(box) >= 0 and max(box) <= 1:
        return "it lies within one pixel: perhaps it is in fractions of 1"
    if x2 - x1 < 1 or y2 - y1 < 1:
        return "it is smaller than a pixel"
    if not sizes or any(_is_within(box, size) for size in sizes):
        return None
    width, height = max(sizes, key=lambda size: size[0] * size[1])
    if any(_is_within(box, (size[1], size[0])) for size in sizes):
        cause = "it fits the image turned by 90 degrees, and boxes are in pixels of the upright image"
    elif min(box) < 0:
        cause = "a coordinate is negative"
    elif max(box) <= 1000:
        cause = "perhaps it is in thousandths of the sides"
    else:
        cause = "perhaps it is in pixels of the image at another size"
    return f"it leaves the image of {width} x {height} px by more than {OUTSIDE} px: {cause}"


def _is_within(box: Box, size: Size) -> bool:
    return min(box) >= -OUTSIDE and box[2] <= size[0] + OUTSIDE and box[3] <= size[1] + OUTSIDE
