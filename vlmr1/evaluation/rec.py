"""Referring expressions: completions and solutions -> acc@0.5 and mean IoU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlmr1.rewards.accuracy import box_iou
from vlmr1.rewards.answer import has_format, predicted_box

THRESHOLD = 0.5


@dataclass(frozen=True)
class RecResult:
    """Scores of one evaluation; the shares are of all rows, in 0..1."""

    ious: tuple[float, ...]  # one a row, 0 where no box could be parsed
    accuracy: float  # acc@0.5: share of rows with IoU > 0.5
    mean_iou: float
    format_share: float
    parse_failure_share: float  # no box in the answer


def score_rec(texts: Sequence[str], solutions: Sequence[str]) -> RecResult:
    """Scores one completion a row against its solution; a row that cannot be parsed counts as IoU 0."""
    if len(texts) != len(solutions) or not texts:
        raise ValueError(f"{len(texts)} completions for {len(solutions)} solutions")
    ious = tuple(box_iou(text, solution) for text, solution in zip(texts, solutions, strict=True))
    count = len(ious)
    return RecResult(
        ious=ious,
        accuracy=sum(value > THRESHOLD for value in ious) / count,
        mean_iou=sum(ious) / count,
        format_share=sum(map(has_format, texts)) / count,
        parse_failure_share=sum(predicted_box(text) is None for text in texts) / count,
    )
