"""Rollouts without a model: the scheduler decodes completions of given lengths."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from vlmr1.rollout import SamplingSettings
from vlmr1.rollout.decode_state import DecodeState
from vlmr1.rollout.engine import Request, RolloutStats, SampledCompletion
from vlmr1.rollout.kv_cache import KVCache
from vlmr1.rollout.scheduler import Scheduler
from vlmr1.rollout.sequences import RunningGroup, RunningSequence

ONE = SimpleNamespace(num_hidden_layers=1, num_key_value_heads=1, hidden_size=1, num_attention_heads=1)
HEAD = SimpleNamespace(weight=torch.zeros(1, 1))


def state_of(blocks: int) -> DecodeState:
    cache = KVCache(ONE, blocks, device=torch.device("cpu"), dtype=torch.float32)
    return DecodeState(cache, torch.zeros(0, dtype=torch.int64))


def length_draws(kind: str, shape: tuple[int, int], limit: int, seed: int) -> np.ndarray:
    """Lengths of completions: skewed, a quarter at the limit and the others short, or all at the limit."""
    random = np.random.default_rng(seed)
    if kind == "lognormal":
        lengths = np.exp(random.normal(np.log(limit / 6), 0.8, shape))
    elif kind == "bimodal":
        lengths = np.where(random.random(shape) < 0.25, limit, random.integers(50, limit // 4, shape))
    else:
        lengths = np.full(shape, limit)
    return np.clip(lengths, 1, limit).astype(int)


class StubScheduler(Scheduler):
    """Decodes `lengths` [P, G] behind prompts of `prompt_tokens`, and counts steps, rows of each and wasted tokens."""

    def __init__(
        self, lengths: np.ndarray, limit: int, prompt_tokens: int | Sequence[int], state: DecodeState, **options
    ):
        sizes = np.broadcast_to(prompt_tokens, len(lengths))
        prompts: Any = [
            SimpleNamespace(input_ids=range(size), positions=[0], next_position=size, sample=SimpleNamespace(index=i))
            for i, size in enumerate(sizes.tolist())
        ]
        engine: Any = SimpleNamespace(dtype=None, tokenizer=None, stats=RolloutStats(), stop_ids=frozenset)
        engine.model, engine.family = SimpleNamespace(device=torch.device("cpu")), SimpleNamespace(head=lambda _: HEAD)
        super().__init__(engine, Request(prompts, lengths.shape[1], SamplingSettings(limit), 0), state, {}, **options)
        self.lengths = lengths
        self.steps = self.row_steps = 0

    def prefill(self, groups: Sequence[RunningGroup]) -> None:
        missing = [(p, g) for p in groups for g in range(self.lengths.shape[1]) if (p.index, g) not in self.done]
        self.running += [RunningSequence(p, g, [0]) for p, g in missing]
        self.batch = None

    def decode(self, steps: int) -> None:
        if self.with_graphs:
            self.batch_and_step()
        self.steps += steps
        self.row_steps += steps * len(self.running)
        for sequence in self.running:
            sequence.tokens += [0] * steps

    def capture(self, capacity: Any, pool: Any) -> Any:
        self.stats.captures += 1
        return SimpleNamespace(capacity=capacity, batch=self.new_batch(capacity))

    def finished(self, sequence: RunningSequence) -> SampledCompletion | None:
        length = int(self.lengths[sequence.group.index, sequence.index])
        return SampledCompletion([0] * length, [], [], "stop") if len(sequence.tokens) >= length else None

    def figures(self) -> tuple[int, int, float]:
        """Decode steps, tokens decoded in vain, and mean rows of a step."""
        kept = int(self.lengths.sum())
        wasted = self.row_steps + self.lengths.size - kept
        return self.steps, wasted, self.row_steps / self.steps
