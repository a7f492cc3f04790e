"""Greedy evaluation of a loaded model on rows with a true box."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlmr1.data.box_coordinates import Setting
from vlmr1.evaluation.decode import Decoder
from vlmr1.evaluation.rec import RecResult, score_rec
from vlmr1.types import Sample


@dataclass(frozen=True)
class Evaluation:
    """Scores and completions, in the order of the rows."""

    result: RecResult
    texts: list[str]


def evaluate(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    *,
    max_completion_length: int,
    batch_size: int = 32,
    box_coordinates: Setting = "auto",
) -> Evaluation:
    """Decode each row greedily, convert predicted boxes to pixels of the file, and score them."""
    decoder = Decoder(model, processor, max_completion_length=max_completion_length, box_coordinates=box_coordinates)
    records = []
    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        records += decoder(batch, range(start, start + len(batch)))
    texts = [record.completion for record in records]
    return Evaluation(
        score_rec(texts, [sample.solution for sample in samples], [record.sizes for record in records]), texts
    )
