"""Strict detection rewards: every predicted box counts, in any order; a surplus box lowers the score."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlmr1.data.boxes import Box, Scale, area, scale_box, to_xywh
from vlmr1.rewards.answer import LabelledBox, labelled_boxes, predicted_boxes, true_text, with_only_label
from vlmr1.rewards.coco import AP, IOU_THRESHOLDS, RECALLS, box_ious

THRESHOLD = 0.5  # IoU from which two boxes match
POSITION, COMPLETENESS = 0.7, 0.3  # weights of the weighted sum


def mean_ap(
    content: str,
    solution: str,
    thresholds: slice = AP,
    *,
    by_count: bool = False,
    box_scale: Scale | None = None,
    **options: Any,
) -> float:
    """Return the mean average precision over IoU thresholds and labels; all boxes of a label are one operating point.

    TP is the size of a maximum matching, precision P = TP / predicted, recall R = TP / true. The value is P times the
    share of COCO's 101 recall levels up to R, so the order of the boxes does not matter. Labels are those of solution
    and answer together; one that is not in the solution has 0. Without true boxes the value is 1 for "None" or an empty
    list, else 0. `by_count` multiplies it by min(1, true / predicted). `box_scale` converts the answer's boxes to px of
    the file.
    """
    truths = true_boxes(solution)
    predictions = _predicted(content, truths, box_scale)
    if predictions is None:
        return 0.0
    if not truths or not predictions:
        return float(not truths and not predictions)
    expected, predicted = _by_label(truths), _by_label(predictions)
    levels = IOU_THRESHOLDS[thresholds].tolist()
    labels = {*expected, *predicted}
    values = [value for label in labels for value in _precisions(predicted[label], expected[label], levels)]
    result = math.fsum(values) / (len(labels) * len(levels))
    return result * min(1.0, len(truths) / len(predictions)) if by_count else result


def weighted_sum(content: str, solution: str, *, box_scale: Scale | None = None, **options: Any) -> float:
    """Return 0.7 * sum of IoU of matched boxes / true + 0.3 * (1 - (missed / true + false / predicted) / 2).

    Boxes of one label match from an IoU of 0.5 on, those of highest IoU first. Without true boxes: see `mean_ap`.
    """
    truths = true_boxes(solution)
    predictions = _predicted(content, truths, box_scale)
    if predictions is None:
        return 0.0
    if not truths or not predictions:
        return float(not truths and not predictions)
    expected, predicted = _by_label(truths), _by_label(predictions)
    overlaps = [iou for label in expected for iou in _greedy(predicted[label], expected[label])]
    missed, false = len(truths) - len(overlaps), len(predictions) - len(overlaps)
    complete = 1.0 - (missed / len(truths) + false / len(predictions)) / 2.0
    return POSITION * math.fsum(overlaps) / len(truths) + COMPLETENESS * complete


def true_boxes(solution: str) -> list[LabelledBox]:
    """Return a solution's boxes. ValueError where it is neither "None" nor a list of boxes with labels and areas."""
    boxes = labelled_boxes(true_text(solution))
    if boxes is None or any(label is None or box is None or area(box) == 0 for label, box in boxes):
        raise ValueError(
            'the solution is neither None nor a list of {"bbox_2d": [x1, y1, x2, y2], "label": ...} with areas: '
            f"{solution[:120]!r}"
        )
    return boxes


def _predicted(content: str, truths: Sequence[LabelledBox], scale: Scale | None) -> list[LabelledBox] | None:
    boxes = predicted_boxes(content)
    if boxes is None:
        return None
    boxes = with_only_label(boxes, {label for label, _ in truths if label is not None})
    return [(each.label, None if each.box is None else scale_box(each.box, scale)) for each in boxes]


def _by_label(boxes: Sequence[LabelledBox]) -> dict[str | None, list[Box | None]]:
    result = defaultdict(list)
    for label, box in boxes:
        result[label].append(box)
    return result


def _precisions(
    predicted: Sequence[Box | None], expected: Sequence[Box | None], thresholds: Sequence[float]
) -> list[float]:
    """Precision times the share of recall levels reached, at each IoU threshold; [] for a label of one side only."""
    if not predicted or not expected:
        return []
    ious = _ious(predicted, expected)  # [D, G]
    pairs = np.array([_matched(ious >= threshold) for threshold in thresholds])
    reached = np.searchsorted(RECALLS, pairs / len(expected), side="right") / len(RECALLS)
    return (pairs / len(predicted) * reached).tolist()


def _matched(near: np.ndarray) -> int:
    """Size of a maximum matching of a bipartite graph [D, G], by augmenting paths."""
    owner: dict[int, int] = {}

    def place(row: int, tried: set[int]) -> bool:
        for column in np.flatnonzero(near[row]).tolist():
            if column not in tried:
                tried.add(column)
                if column not in owner or place(owner[column], tried):
                    owner[column] = row
                    return True
        return False

    return sum(place(row, set()) for row in range(len(near)) if near[row].any())


def _greedy(predicted: Sequence[Box | None], expected: Sequence[Box | None]) -> list[float]:
    """IoUs of the matched pairs; ties are broken by coordinates, so that the order of a list does not matter."""
    if not predicted or not expected:
        return []
    ious = _ious(predicted, expected)
    pairs = [(-ious[i, j], predicted[i], expected[j], i, j) for i, j in np.argwhere(ious >= THRESHOLD).tolist()]
    rows, columns, result = set(), set(), []
    for negative, _, _, i, j in sorted(pairs, key=lambda pair: pair[:3]):
        if i not in rows and j not in columns:
            rows.add(i)
            columns.add(j)
            result.append(float(-negative))
    return result


def _ious(predicted: Sequence[Box | None], expected: Sequence[Box | None]) -> np.ndarray:
    """IoU [D, G]; 0 for a box that could not be read or has no area."""
    return box_ious([_size(box) for box in predicted], [_size(box) for box in expected])


def _size(box: Box | None) -> list[float]:
    """x, y, width, height; a box without area becomes one that overlaps nothing."""
    if box is None or area(box) == 0:
        return [-1.0, -1.0, 0.0, 0.0]
    return to_xywh(box)
