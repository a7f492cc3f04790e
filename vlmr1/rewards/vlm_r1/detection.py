"""Published detection rewards: COCO average precision, and a weighted sum of overlap and completeness."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from vlmr1.rewards.coco import AP, Category, average_precision
from vlmr1.rewards.vlm_r1.iou import inclusive_iou
from vlmr1.rewards.vlm_r1.tags import ANSWER, FENCE, clean

THRESHOLD = 0.5  # IoU from which two boxes match
POSITION, COMPLETENESS = 0.7, 0.3  # weights of the weighted sum


def mean_ap(content: str, solution: str, thresholds: slice = AP, *, by_count: bool = False) -> float:
    """Average precision of the boxes in the last JSON fences; 1 where neither text has a box."""
    expected = _last(solution)
    truths = _boxes(expected) if expected else []
    predictions = _readable(_last(content))
    if predictions and truths:
        result = _precision(predictions, truths, thresholds)
    else:
        result = float(not predictions and not truths)
    few_enough = len(truths) >= len(predictions)
    return result if few_enough or not by_count else result * (len(truths) / len(predictions))


def answer_ap(content: str, solution: str, thresholds: slice = AP, *, by_count: bool = False) -> float:
    """`mean_ap` of the last answer; 0 without one, 1 where answer and solution both are "None"."""
    match = ANSWER.search(solution)
    expected = match[1].strip() if match else None
    answers = ANSWER.findall(content)
    if not answers:
        return 0.0
    answer = answers[-1].strip()
    if answer == expected == "None":
        return 1.0
    if expected is None:
        raise TypeError("the solution has no <answer>")
    return mean_ap(answer, expected, thresholds, by_count=by_count)


def weighted_sum(content: str, solution: str) -> float:
    """0.7 * mean IoU of matched boxes of one label + 0.3 * (1 - (missed share + false share) / 2)."""
    answer, expected = clean(content), clean(solution)
    return float(answer == "none") if expected == "none" else detection_score(answer, expected)


def detection_score(content: str, solution: str) -> float:
    """The weighted sum for the first JSON fences of two cleaned texts. Raises for a solution that is not a list."""
    predictions = _readable(_first(clean(content)))
    expected = _first(clean(solution))
    truths = _boxes(expected) if expected else []
    if not truths or not predictions:
        return float(not truths and not predictions)
    ious = [[_iou(one, other) for other in truths] for one in predictions]
    free, missed = list(range(len(predictions))), list(range(len(truths)))
    position, label = 0.0, None
    while free and missed:
        pairs = [(i, j) for i in free for j in missed if ious[i][j] >= THRESHOLD]
        if not pairs:
            break
        i, j = max(pairs, key=lambda pair: ious[pair[0]][pair[1]])  # the first of equal pairs
        label = _label(predictions[i], label)  # a box without a label has that of the previous match
        if label is None:
            raise UnboundLocalError("the first match has no label")
        position += ious[i][j] if label == _label(truths[j], "") else 0
        free.remove(i)
        missed.remove(j)
    complete = 1.0 - (len(missed) / len(truths) + len(free) / len(predictions)) / 2.0
    return (POSITION * (position / len(truths)) + COMPLETENESS * complete) / (POSITION + COMPLETENESS)


def _precision(predictions: Sequence[Any], truths: Sequence[Any], thresholds: slice) -> float:
    """Average precision; faulty boxes and those of labels that the solution lacks are left out."""
    categories: dict[Any, Category] = {}
    for truth in truths:
        category = categories.setdefault(truth["label"], Category())
        category.truths.append(_size(truth["bbox_2d"]))
    found = 0
    for prediction in predictions:
        try:
            category, box = categories[prediction["label"]], _size(prediction["bbox_2d"])
        except (LookupError, TypeError, ArithmeticError):
            continue
        category.predictions.append(box)
        found += 1
    return average_precision(list(categories.values()), thresholds) if found else 0.0


def _size(box: Any) -> list[Any]:
    """x1, y1, x2, y2 -> x, y, width, height"""
    width, height = box[2] - box[0], box[3] - box[1]
    _ = width * height  # raises for values that are no numbers
    return [box[0], box[1], width, height]


def _iou(prediction: Any, truth: Any) -> float:
    try:
        return inclusive_iou(prediction["bbox_2d"], truth["bbox_2d"])
    except (KeyError, TypeError, IndexError, ArithmeticError):
        return 0.0


def _label(box: Any, otherwise: str | None) -> str | None:
    try:
        return box["label"].lower()
    except (KeyError, TypeError, IndexError, AttributeError):
        return otherwise


def _first(text: str) -> str | None:
    match = FENCE.search(text)
    return match[1].strip() if match else None


def _last(text: str) -> str | None:
    fences = FENCE.findall(text)
    return fences[-1].strip() if fences else None


def _boxes(text: str) -> list[Any]:
    return list(json.loads(text))


def _readable(text: str | None) -> list[Any]:
    """The boxes of a completion; none where it is not JSON, or nothing that can be iterated."""
    try:
        return _boxes(text) if text else []
    except (ValueError, TypeError, RecursionError):
        return []
