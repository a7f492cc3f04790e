"""The task rec (referring expressions): one true box a row, acc@0.5 and mean IoU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlmr1.data.boxes import Box, Size, iou, scale_between, scale_box
from vlmr1.data.faults import row_fault
from vlmr1.evaluation.bootstrap import ratio
from vlmr1.evaluation.records import Record
from vlmr1.evaluation.scoring import Scored, check_one_image, completion_metrics
from vlmr1.report.cases import Case, LabelledBox
from vlmr1.rewards.answer import has_format, predicted_box
from vlmr1.rewards.strict.iou import true_box
from vlmr1.types import Sample

THRESHOLD = 0.5


@dataclass(frozen=True)
class RecResult:
    """Scores of one evaluation; shares are over all rows, in 0..1."""

    ious: tuple[float, ...]  # one a row, 0 where no box could be parsed
    accuracy: float  # acc@0.5: share of rows with IoU > 0.5
    mean_iou: float
    format_share: float
    parse_failure_share: float  # no box in the answer


def score_rec(texts: Sequence[str], solutions: Sequence[str], sizes: Sequence[tuple[Size, Size]] = ()) -> RecResult:
    """Score one completion a row against its solution; a completion that cannot be parsed has IoU 0.

    `sizes` has for each row the extent of the completion's coordinates, and the size of the file in px; without it
    boxes are compared as written."""
    if len(texts) != len(solutions) or not texts:
        raise ValueError(f"{len(texts)} completions for {len(solutions)} solutions")
    boxes = [answered_box(text, *sizes[i]) if sizes else predicted_box(text) for i, text in enumerate(texts)]
    truths = [true_box(solution) for solution in solutions]
    ious = tuple(0.0 if box is None else iou(box, true) for box, true in zip(boxes, truths, strict=True))
    count = len(ious)
    return RecResult(
        ious=ious,
        accuracy=sum(value > THRESHOLD for value in ious) / count,
        mean_iou=sum(ious) / count,
        format_share=sum(map(has_format, texts)) / count,
        parse_failure_share=sum(box is None for box in boxes) / count,
    )


def answered_box(text: str, extent: Size, original: Size) -> Box | None:
    """The box in a completion's answer in px of the file, or None."""
    box = predicted_box(text)
    return None if box is None else scale_box(box, scale_between(extent, original))


def check_rec(sample: Sample) -> None:
    """Raise DataError for a row without a true box, or with other than one image."""
    check_one_image(sample, "rec")
    try:
        true_box(sample.solution)
    except ValueError as error:
        raise row_fault(sample.source, "solution", str(error)) from error


def score_rec_rows(samples: Sequence[Sample], records: Sequence[Record]) -> Scored:
    """Metrics with bootstrap intervals, and one case a row."""
    texts = [record.text for record in records]
    sizes = [record.sizes for record in records]
    result = score_rec(texts, [sample.solution for sample in samples], sizes)
    boxes = [answered_box(text, *size) for text, size in zip(texts, sizes, strict=True)]
    metrics = {
        "acc@0.5": ratio([float(value > THRESHOLD) for value in result.ious]),
        "mean_iou": ratio(result.ious),
        **completion_metrics(records, failed=[box is None for box in boxes]),
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
