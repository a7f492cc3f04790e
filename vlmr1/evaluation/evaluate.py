"""Greedy evaluation of a checkpoint on rows with a true box."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlmr1.data.prompts import PromptBuilder
from vlmr1.evaluation.rec import RecResult, score_rec
from vlmr1.models import adapter_of
from vlmr1.rollout import NativeEngine, SamplingSettings
from vlmr1.types import Sample


@dataclass(frozen=True)
class Evaluation:
    """Scores and the completions that they are of, in the order of the rows."""

    result: RecResult
    texts: list[str]


def evaluate(
    model: Any, processor: Any, samples: Sequence[Sample], *, max_completion_length: int, batch_size: int = 32
) -> Evaluation:
    """Decode each row greedily; the native engine gives the tokens that `generate` would."""
    adapter = adapter_of(model)
    engine = NativeEngine(model, adapter, processor.tokenizer)
    builder = PromptBuilder(model, adapter, processor)
    settings = SamplingSettings(max_completion_length, greedy=True)
    texts = []
    for start in range(0, len(samples), batch_size):
        prompts = [builder(sample) for sample in samples[start : start + batch_size]]
        texts += [group.completions[0].text for group in engine.generate(prompts, 1, settings)]
    return Evaluation(score_rec(texts, [sample.solution for sample in samples]), texts)
