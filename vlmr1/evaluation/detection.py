"""The task ovd (detection): boxes with labels, average precision, NMS-AP and an image's own score."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmr1.data.boxes import Size, iou, scale_between, scale_box
from vlmr1.data.faults import row_fault
from vlmr1.evaluation.bootstrap import metric, ratio
from vlmr1.evaluation.coco import AveragePrecision, ImageBoxes, ScoredBox, TrueBox
from vlmr1.evaluation.records import Record
from vlmr1.evaluation.scoring import Scored, completion_metrics
from vlmr1.report.cases import Case, LabelledBox
from vlmr1.rewards import answer
from vlmr1.rewards.answer import labelled_boxes, true_text, with_only_label
from vlmr1.rewards.strict.detection import true_boxes
from vlmr1.types import Sample

NMS_IOU = 0.5
MATCH_IOU = 0.5  # for the score of one image
LABELS = "labels"  # column of a row: the labels in its question
CROWD = "crowd"  # column of a row: which of its true boxes are crowds
SCORES = ("score", "confidence")  # keys of a box's score


def check_detection(sample: Sample) -> None:
    """Raise DataError for a row whose solution is not a list of boxes, or whose columns do not match it."""
    try:
        boxes = true_boxes(sample.solution)
    except ValueError as error:
        raise row_fault(sample.source, "solution", str(error)) from error
    labels, crowd = sample.columns.get(LABELS), sample.columns.get(CROWD)
    if labels is not None and not (isinstance(labels, list) and all(isinstance(label, str) for label in labels)):
        raise row_fault(sample.source, "column", f"the column {LABELS} is not a list of texts")
    if crowd is not None and not (isinstance(crowd, list) and len(crowd) == len(boxes)):
        raise row_fault(sample.source, "column", f"the column {CROWD} has not one value for each box")


def true_boxes_of(sample: Sample) -> tuple[TrueBox, ...]:
    """The true boxes of a row that `check_detection` passed."""
    boxes = labelled_boxes(true_text(sample.solution)) or []
    crowd = sample.columns.get(CROWD) or [False] * len(boxes)
    return tuple(
        TrueBox(label, box, bool(many))
        for (label, box), many in zip(boxes, crowd, strict=True)
        if label is not None and box is not None
    )


def asked_labels(sample: Sample) -> list[str]:
    """The case-folded labels in a row's question; [] where it lists none."""
    return [label.strip().casefold() for label in sample.columns.get(LABELS) or []]


def predicted_boxes(
    text: str, extent: Size, original: Size, labels: Collection[str] = ()
) -> tuple[ScoredBox, ...] | None:
    """Return the boxes of a completion's answer in px of the file; None where it has none and does not say None.

    A box's score is its numeric `score` or `confidence`, else 1, 1/2, 1/3, ... by its place in the answer. Boxes in a
    form without labels have the label of `labels` where that is the only one."""
    boxes = answer.predicted_boxes(text)
    if boxes is None:
        return None
    scale = scale_between(extent, original)
    return tuple(
        ScoredBox(each.label, None if each.box is None else scale_box(each.box, scale), _score(each.fields, 1 / place))
        for place, each in enumerate(with_only_label(boxes, labels), start=1)
    )


def keep_best(boxes: ImageBoxes) -> ImageBoxes:
    """Keep the predictions that NMS-AP counts (OVDEval, arXiv:2308.13177), whatever their label.

    Of the predictions whose IoU with a true box is above 0.5, only the one with the highest score is kept. A prediction
    that is the best of another true box is kept, and so is one that is near none."""
    near: set[int] = set()
    best: set[int] = set()
    for true in boxes.truths:
        if true.crowd:
            continue
        on_it = [i for i, each in enumerate(boxes.predictions) if each.box and iou(each.box, true.box) > NMS_IOU]
        if on_it:
            near |= set(on_it)
            best.add(max(on_it, key=lambda i: (boxes.predictions[i].score, -i)))
    kept = (prediction for i, prediction in enumerate(boxes.predictions) if i in best or i not in near)
    return ImageBoxes(boxes.truths, tuple(kept))


def image_f1(boxes: ImageBoxes) -> float:
    """Return the F1 score of one image at IoU 0.5 with labels, 2 * TP / (true + predicted); 1 without any boxes."""
    truths = [true for true in boxes.truths if not true.crowd]
    if not truths and not boxes.predictions:
        return 1.0
    free, matched = set(range(len(truths))), 0
    for each in sorted(boxes.predictions, key=lambda box: -box.score):
        same = [i for i in free if each.label == truths[i].label]
        fits = [] if each.box is None else [(iou(each.box, truths[i].box), -i) for i in same]
        overlap, place = max(fits, default=(0.0, 0))
        if overlap >= MATCH_IOU:
            free.remove(-place)
            matched += 1
    return 2 * matched / (len(truths) + len(boxes.predictions))


def _score(entry: Mapping[str, Any], default: float) -> float:
    for name in SCORES:
        value = entry.get(name)
        if isinstance(value, float) and math.isfinite(value):
            return value
    return default


@dataclass(frozen=True)
class DetectionScores:
    """Boxes of all images, AP over all predictions, and over those that NMS-AP counts."""

    images: list[ImageBoxes]
    failed: list[bool]  # answers that are not a list of boxes
    plain: AveragePrecision
    best: AveragePrecision


def detection_scores(samples: Sequence[Sample], records: Sequence[Record]) -> DetectionScores:
    """Match the boxes of one completion a row with the true ones."""
    answers = [
        predicted_boxes(record.text, *record.sizes, {true.label for true in true_boxes_of(sample)})
        for sample, record in zip(samples, records, strict=True)
    ]
    images = [ImageBoxes(true_boxes_of(sample), boxes or ()) for sample, boxes in zip(samples, answers, strict=True)]
    labels = {label for sample in samples for label in asked_labels(sample)}
    labels |= {true.label for image in images for true in image.truths}
    plain, best = (AveragePrecision(each, sorted(labels)) for each in (images, [keep_best(boxes) for boxes in images]))
    return DetectionScores(images, [boxes is None for boxes in answers], plain, best)


def score_ovd_rows(samples: Sequence[Sample], records: Sequence[Record]) -> Scored:
    """Metrics with bootstrap intervals, and one case a row."""
    scores = detection_scores(samples, records)
    images, plain, labels = scores.images, scores.plain, scores.plain.labels
    drawn, drawn_best = plain.replicates(), scores.best.replicates()
    boxes_of = [float(len(image.predictions)) for image in images]
    unknown = [float(sum(box.label not in labels for box in image.predictions)) for image in images]
    metrics = {
        **{name: metric(plain.value(name), drawn[name]) for name in drawn},
        "nms_ap": metric(scores.best.value("ap"), drawn_best["ap"]),
        **completion_metrics(records, scores.failed),
        "unknown_label_share": ratio(unknown, boxes_of),
    }
    counts = {
        "rows": len(records),
        "labels": len(labels),
        "true_boxes": sum(len(image.truths) for image in images),
        "predicted_boxes": int(sum(boxes_of)),
        "ap_by_label": plain.by_label(),
    }
    cases = [
        Case(
            sample=sample,
            completion=record.completion,
            score=image_f1(image),
            true=tuple(LabelledBox(true.label, true.box) for true in image.truths),
            predicted=tuple(LabelledBox(box.label or "", box.box) for box in image.predictions if box.box is not None),
        )
        for sample, record, image in zip(samples, records, images, strict=True)
    ]
    return Scored(metrics, counts, cases)
