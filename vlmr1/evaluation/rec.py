"""Referring expressions: completions and solutions -> acc@0.5 and mean IoU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlmr1.data.boxes import Box, Size, iou, scale_between, scale_box
from vlmr1.rewards.answer import has_format, predicted_box
from vlmr1.rewards.strict.iou import true_box

THRESHOLD = 0.5


@dataclass(frozen=True)
class RecResult:
    """Scores of one evaluation; the shares are of all rows, in 0..1."""

    ious: tuple[float, ...]  # one a row, 0 where no box could be parsed
    accuracy: float  # acc@0.5: share of rows with IoU > 0.5
    mean_iou: float
    format_share: float
    parse_failure_share: float  # no box in the answer


def score_rec(texts: Sequence[str], solutions: Sequence[str], sizes: Sequence[tuple[Size, Size]] = ()) -> RecResult:
    """Scores one completion a row against its solution; a row that cannot be parsed counts as IoU 0.

    `sizes` has for each row the extent of the coordinates that its completion is in, and the size of the file in px;
    without them boxes are compared as they are written."""
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
    """The box that a completion answers in px of the file, or None."""
    box = predicted_box(text)
    return None if box is None else scale_box(box, scale_between(extent, original))
