"""Evaluation of a loaded model on rows with a true box: the greedy completion of each row, and sampled ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from vlmr1.data.box_coordinates import Setting
from vlmr1.evaluation.decode import Decoder
from vlmr1.evaluation.rec import THRESHOLD, RecResult, score_rec
from vlmr1.models.features import FeatureCache
from vlmr1.rewards.answer import has_format
from vlmr1.rollout import SamplingSettings
from vlmr1.types import Sample


@dataclass(frozen=True)
class Evaluation:
    """Scores and completions, in the order of the rows."""

    result: RecResult
    texts: list[str]
    sampled: RecResult | None = None  # of `draws` completions a row; those of a row are adjacent
    sampled_texts: tuple[str, ...] = ()

    @cached_property
    def rows(self) -> dict[str, np.ndarray]:
        """Scores of each row [rows] by the metric's name; those of draws are means over a row's draws."""
        found = {}
        for kind, result, texts in (("greedy", self.result, self.texts), ("sampled", self.sampled, self.sampled_texts)):
            if result is not None:
                ious = np.array(result.ious).reshape(len(self.texts), -1)
                formats = np.array([has_format(text) for text in texts], dtype=float).reshape(ious.shape)
                scores = {"mean IoU": ious, "acc@0.5": (ious > THRESHOLD).astype(float), "format": formats}
                found |= {f"{kind} {name}": values.mean(1) for name, values in scores.items()}
        return found


def evaluate(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    *,
    max_completion_length: int,
    batch_size: int = 32,
    box_coordinates: Setting = "auto",
    draws: int = 0,
    seed: int = 0,
) -> Evaluation:
    """Decode each row greedily and `draws` times at temperature 1, convert predicted boxes to pixels of the file, and
    score them. Each image is encoded once."""
    decoder = Decoder(model, processor, max_completion_length=max_completion_length, box_coordinates=box_coordinates)
    sampling = SamplingSettings(max_completion_length, seed=seed)
    records, texts = [], []
    for start in range(0, len(samples), batch_size):
        decoder.engine.features = FeatureCache() if draws else None
        prompts = [decoder.builder(sample) for sample in samples[start : start + batch_size]]
        groups = decoder.engine.generate(prompts, 1, decoder.sampling)
        records += [decoder.record(group, row) for row, group in enumerate(groups, start)]
        if draws:
            drawn = decoder.engine.generate(prompts, draws, sampling)
            texts += [completion.text for group in drawn for completion in group.completions]
    solutions, sizes = [sample.solution for sample in samples], [record.sizes for record in records]
    greedy = [record.completion for record in records]
    sampled = score_rec(texts, _repeated(solutions, draws), _repeated(sizes, draws)) if draws else None
    return Evaluation(score_rec(greedy, solutions, sizes), greedy, sampled, tuple(texts))


def _repeated(values: Sequence[Any], times: int) -> list[Any]:
    return [value for value in values for _ in range(times)]
