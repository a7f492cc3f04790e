"""COCO average precision of one image whose detections all have the same score.

Bit-equal to `pycocotools.cocoeval.COCOeval`, and much faster: one image, one area range, no crowds, no sorting. IoUs
come from `pycocotools.mask`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlmr1.errors import import_for

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)  # [T]
RECALLS = np.linspace(0.0, 1.0, 101)  # [R]
MAX_DETECTIONS = 100  # per category
MAX_AREA = 1e10  # px^2; larger or negative areas are ignored
AP, AP50 = slice(None), slice(1)  # slices of IOU_THRESHOLDS
TINY = np.spacing(1)

Boxes = list[list[Any]]  # x, y, width, height in px


@dataclass
class Category:
    """Boxes of one label."""

    truths: Boxes = field(default_factory=list)
    predictions: Boxes = field(default_factory=list)


def average_precision(categories: Sequence[Category], thresholds: slice = AP) -> float:
    """Mean interpolated precision over IoU thresholds, recall levels and categories; -1 if every box is ignored."""
    curves = [precision(category, IOU_THRESHOLDS[thresholds]) for category in categories]
    counted = [curve for curve in curves if curve is not None]
    return float(np.mean(np.stack(counted, axis=-1).ravel())) if counted else -1.0


def precision(category: Category, thresholds: np.ndarray) -> np.ndarray | None:
    """Precision [T, R] by IoU threshold and recall; None where every true box is ignored."""
    boxes = category.predictions[:MAX_DETECTIONS]
    sizes = np.array([_is_ignored(box) for box in category.truths])
    order = np.argsort(sizes, kind="stable")  # ignored ones last
    ignored = sizes[order].tolist()
    count = ignored.count(False)
    ious = box_ious(boxes, category.truths)
    if count == 0:
        return None
    curve = np.zeros((len(thresholds), len(RECALLS)))
    if not boxes:
        return curve
    overlaps = ious[:, order].tolist()  # [D, G]
    outside = [_is_ignored(box) for box in boxes]
    outcomes: dict[tuple[int, ...], np.ndarray] = {}  # most thresholds have the same
    for row, threshold in zip(curve, thresholds.tolist(), strict=True):
        outcome = tuple(match(overlaps, ignored, outside, min(threshold, 1 - 1e-10)))
        if outcome not in outcomes:
            outcomes[outcome] = _interpolated(np.array(outcome), count)
        row[:] = outcomes[outcome]
    return curve


def box_ious(boxes: Boxes, truths: Boxes) -> np.ndarray:
    """IoU [D, G] of continuous boxes; empty where one of the lists is."""
    mask = import_for("the reward of average precision", "pycocotools.mask", "pycocotools")
    return np.asarray(mask.iou(boxes, truths, [0] * len(truths)))


def match(overlaps: list[list[float]], ignored: list[bool], outside: list[bool], threshold: float) -> list[int]:
    """Match each detection in turn to the free true box of highest IoU: 1 true positive, 0 false, -1 ignored."""
    taken, outcome = [False] * len(ignored), []
    for row, is_outside in zip(overlaps, outside, strict=True):
        best, found = threshold, -1
        for place, overlap in enumerate(row):
            if taken[place]:
                continue
            if found >= 0 and ignored[place] and not ignored[found]:
                break
            if overlap < best:  # NaN is not
                continue
            best, found = overlap, place
        if found >= 0:
            taken[found] = True
            outcome.append(-1 if ignored[found] else 1)
        else:
            outcome.append(-1 if is_outside else 0)
    return outcome


def _interpolated(outcome: np.ndarray, count: int) -> np.ndarray:
    """Outcomes [D] -> for each recall level the highest precision at that recall or above."""
    hits, misses = np.cumsum(outcome == 1).astype(float), np.cumsum(outcome == 0).astype(float)
    envelope = np.maximum.accumulate((hits / (misses + hits + TINY))[::-1])[::-1]
    places = np.searchsorted(hits / count, RECALLS, side="left")
    return np.append(envelope, 0.0)[places]


def _is_ignored(box: list[Any]) -> bool:
    area = box[2] * box[3]
    return area < 0 or area > MAX_AREA
