"""Records of completions -> the metrics of a task, and one case a row for the picture page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlmr1.data.boxes import Size
from vlmr1.evaluation.bootstrap import Metric, metric, ratio
from vlmr1.evaluation.coco import AveragePrecision, ImageBoxes
from vlmr1.evaluation.detection import asked, best_of_each, image_score, predicted, truths_of
from vlmr1.evaluation.rec import THRESHOLD, answered_box, score_rec
from vlmr1.evaluation.records import Record
from vlmr1.evaluation.vqa import answered, score_vqa
from vlmr1.report.cases import Case, LabelledBox
from vlmr1.rewards.answer import has_format
from vlmr1.rewards.methods import method_of
from vlmr1.rewards.pool import RewardPool
from vlmr1.rewards.settings import RewardSettings
from vlmr1.rewards.strict.iou import true_box
from vlmr1.types import Sample


@dataclass(frozen=True)
class Scored:
    """Metrics by name, in the order in which they are shown; numbers of what they are over; one case a row."""

    metrics: dict[str, Metric]
    counts: dict[str, Any]
    cases: list[Case]


def score_task(
    task: str,
    samples: Sequence[Sample],
    records: Sequence[Record],
    *,
    rewards: RewardSettings | None = None,
    pool: RewardPool | None = None,
) -> Scored:
    """Score one completion a row. `rewards` and `pool` are of vqa."""
    if task == "rec":
        return score_rec_rows(samples, records)
    if task == "ovd":
        return score_ovd_rows(samples, records)
    return score_vqa_rows(samples, records, rewards or RewardSettings(accu_reward_method="default"), pool)


def score_rec_rows(samples: Sequence[Sample], records: Sequence[Record]) -> Scored:
    texts = [record.completion for record in records]
    sizes = [sizes_of(record) for record in records]
    result = score_rec(texts, [sample.solution for sample in samples], sizes)
    boxes = [answered_box(text, *size) for text, size in zip(texts, sizes, strict=True)]
    metrics = {
        "acc@0.5": ratio([float(value > THRESHOLD) for value in result.ious]),
        "mean_iou": ratio(result.ious),
        **_form(records, failed=[box is None for box in boxes]),
    }
    cases = [
        Case(
            sample=sample,
            completion=record.completion,
            score=score,
            true=(LabelledBox("", true_box(sample.solution)),),
            predicted=() if box is None else (LabelledBox("", box),),
        )
        for sample, record, score, box in zip(samples, records, result.ious, boxes, strict=True)
    ]
    return Scored(metrics, {"rows": len(records)}, cases)


def score_ovd_rows(samples: Sequence[Sample], records: Sequence[Record]) -> Scored:
    said = [predicted(record.completion, *sizes_of(record)) for record in records]
    images = [ImageBoxes(truths_of(sample), boxes or ()) for sample, boxes in zip(samples, said, strict=True)]
    labels = sorted({label for sample in samples for label in (*asked(sample), *_labels(truths_of(sample)))})
    plain, best = (AveragePrecision(each, labels) for each in (images, [best_of_each(boxes) for boxes in images]))
    drawn, drawn_best = plain.replicates(), best.replicates()
    boxes_of = [float(len(image.predictions)) for image in images]
    unknown = [float(sum(box.label not in labels for box in image.predictions)) for image in images]
    metrics = {
        **{name: metric(plain.value(name), drawn[name]) for name in drawn},
        "nms_ap": metric(best.value("ap"), drawn_best["ap"]),
        **_form(records, failed=[boxes is None for boxes in said]),
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
            score=image_score(image),
            true=tuple(LabelledBox(true.label, true.box) for true in image.truths),
            predicted=tuple(LabelledBox(box.label or "", box.box) for box in image.predictions if box.box is not None),
        )
        for sample, record, image in zip(samples, records, images, strict=True)
    ]
    return Scored(metrics, counts, cases)


def score_vqa_rows(
    samples: Sequence[Sample], records: Sequence[Record], settings: RewardSettings, pool: RewardPool | None
) -> Scored:
    scores, late = score_vqa(samples, records, settings, pool)
    methods = [method_of(sample, settings) for sample in samples]
    by_method = {
        f"score/{method}": ratio(
            [score * (each == method) for score, each in zip(scores, methods, strict=True)],
            [float(each == method) for each in methods],
        )
        for method in sorted(set(methods))
    }
    metrics = {
        "score": ratio(scores),
        **(by_method if len(by_method) > 1 else {}),
        **_form(records, failed=[not answered(record.completion) for record in records]),
    }
    counts = {
        "rows": len(records),
        "rows_by_method": {method: methods.count(method) for method in sorted(set(methods))},
        "timed_out": late,
    }
    cases = [
        Case(sample=sample, completion=record.completion, score=score, solution=sample.solution)
        for sample, record, score in zip(samples, records, scores, strict=True)
    ]
    return Scored(metrics, counts, cases)


def sizes_of(record: Record) -> tuple[Size, Size]:
    """The extent of the coordinates that a record's boxes are in, and the size of its image in px."""
    assert record.box_extent is not None and record.image_size is not None
    return record.box_extent, record.image_size


def _labels(boxes: Sequence[Any]) -> list[str]:
    return [box.label for box in boxes]


def _form(records: Sequence[Record], failed: Sequence[bool]) -> dict[str, Metric]:
    """What is said of every task: form, answers that could not be read, completions that met the limit, tokens."""
    return {
        "format_share": ratio([float(has_format(record.completion)) for record in records]),
        "parse_failure_share": ratio([float(each) for each in failed]),
        "truncated_share": ratio([float(record.finish_reason == "length") for record in records]),
        "completion_length": ratio([float(len(record.token_ids)) for record in records]),
    }
