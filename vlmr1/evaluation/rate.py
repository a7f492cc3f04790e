"""`vlmr1 data rate`: G completions of each row, sampled and scored as in training, by batches of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vlmr1.data.samples import Samples
from vlmr1.evaluation.records import RowRecord
from vlmr1.grpo import setup
from vlmr1.rewards.groups import TimedOut, score_groups
from vlmr1.rewards.pool import RewardPool
from vlmr1.rollout import NativeEngine
from vlmr1.types import Sample


@dataclass(frozen=True)
class RatedRow(RowRecord):
    """The completions of one row with their rewards."""

    completions: Sequence[str]  # G
    finish_reasons: Sequence[str]  # G: "stop" | "length"
    rewards: Sequence[Sequence[float]]  # [G, R]
    timed_out: int = 0  # rewards that are 0 because their function took too long or raised


class Rater:
    """Samples and scores completions by the settings of a run.

    With the native engine the random numbers of a row depend on the seed and the row alone. `generate` of transformers
    draws a batch together, so its seed is that of the batch's first row; batches do not depend on what was decoded."""

    def __init__(self, model: Any, processor: Any, samples: Samples, args: Any, pool: RewardPool | None):
        self.args, self.processor, self.pool = args, processor, pool
        self.dtype = torch.bfloat16 if args.bf16 else None
        _, self.family, _ = setup.prepare_model(model, args)
        self.rewards, self.weights = setup.make_rewards(args, model, processor, None)
        self.engine = setup.make_engine(self, model)
        self.prompts = setup.make_dataset(model, self.family, processor, samples, args)
        self.sampling = args.sampling()
        self.working: set[str] = set()  # names of functions that have scored a completion

    @property
    def samples(self) -> Any:
        """The `Samples` that training would read."""
        return self.prompts.samples

    def __call__(self, samples: Sequence[Sample], rows: Sequence[int]) -> list[RatedRow]:
        """Rate these samples together; `rows` are their places in the data."""
        prompts = [self.prompts.builder(sample) for sample in samples]
        step = 0 if isinstance(self.engine, NativeEngine) else rows[0]
        groups = self.engine.generate(prompts, self.args.num_generations, self.sampling, step=step)
        late: list[TimedOut] = []
        rated = []
        scored = score_groups(groups, self.rewards, pool=self.pool, timed_out=late, working=self.working)
        for row, group in zip(rows, scored, strict=True):
            assert group.rewards is not None
            texts = [completion.text for completion in group.completions]
            reasons = [completion.finish_reason for completion in group.completions]
            count = sum(each.group == len(rated) for each in late)
            rated.append(RatedRow(row, group.prompt.sample.source, texts, reasons, group.rewards.tolist(), count))
        return rated
