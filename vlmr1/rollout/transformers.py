"""The fallback engine: `model.generate` on prompts repeated G times, padded on the left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import GenerationConfig

from vlmr1.rollout.engine import RolloutEngine
from vlmr1.rollout.sampling import SamplingSettings, mix
from vlmr1.types import Prompt


@contextmanager
def _plain_generation(model: Any) -> Iterator[None]:
    """The checkpoint's own sampling settings (penalties, truncation) have no part in a rollout."""
    before = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=before.eos_token_id, pad_token_id=before.pad_token_id)
    try:
        yield
    finally:
        model.generation_config = before


class TransformersEngine(RolloutEngine):
    """Works with any model that generates; its draws depend on the batch that a prompt is in."""

    def draw(
        self, prompts: Sequence[Prompt], num_generations: int, settings: SamplingSettings, step: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        device = self.model.device
        inputs = self._inputs([p for p in prompts for _ in range(num_generations)], device)
        with torch.random.fork_rng(), _plain_generation(self.model):
            torch.manual_seed(int(mix(settings.seed, step)) % 2**63)
            drawn = self.model.generate(
                **inputs,
                max_new_tokens=settings.max_completion_length,
                do_sample=not settings.greedy,
                temperature=None if settings.greedy else settings.temperature,
                top_k=None if settings.greedy else 0,
                top_p=None if settings.greedy else 1.0,
                suppress_tokens=self.adapter.placeholder_ids(self.model, self.tokenizer),
                return_dict_in_generate=True,
                output_logits=True,
            )
        tokens = drawn.sequences[:, inputs["input_ids"].shape[1] :]
        full = (torch.stack(drawn.logits, 1).float() / settings.temperature).log_softmax(-1)  # [B, T, V]
        logp = full.gather(-1, tokens[..., None])[..., 0]
        banned = torch.tensor(self.adapter.placeholder_ids(self.model, self.tokenizer), device=device)
        allowed = full.index_fill(-1, banned, float("-inf")).logsumexp(-1)
        return tokens, logp, logp - allowed

    def _inputs(self, prompts: Sequence[Prompt], device: torch.device) -> dict[str, Tensor]:
        width = max(len(p.input_ids) for p in prompts)
        padding = self.model.generation_config.pad_token_id or 0
        ids = [pad(p.input_ids, (width - len(p.input_ids), 0), value=padding) for p in prompts]
        masks = [pad(torch.ones_like(p.input_ids), (width - len(p.input_ids), 0)) for p in prompts]
        input_ids = torch.stack(ids)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.stack(masks),
            **self.adapter.generation_inputs(self.model, input_ids, [p.images for p in prompts]),
        }
        return {name: value.to(device) for name, value in inputs.items()}
