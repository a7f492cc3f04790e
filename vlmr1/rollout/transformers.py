"""The fallback engine: `model.generate` on prompts repeated G times, padded on the left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import GenerationConfig

from vlmr1.rollout.engine import Request, RolloutEngine, SampledCompletion, StopCriteria
from vlmr1.rollout.sampling import SamplingSettings, hash_keys
from vlmr1.types import Prompt


@contextmanager
def _plain_generation(model: Any, stops: frozenset[int], padding: int) -> Iterator[None]:
    """Ignore the checkpoint's own sampling settings (penalties, truncation)."""
    before = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=sorted(stops) or None, pad_token_id=padding)
    try:
        yield
    finally:
        model.generation_config = before


class TransformersEngine(RolloutEngine):
    """Calls `model.generate`, so it supports any model; a completion depends on the batch that its prompt is in."""

    def sample(self, request: Request) -> list[SampledCompletion]:
        settings, prompts = request.settings, request.prompts
        inputs = self._inputs([p for p in prompts for _ in range(request.num_generations)], self.model.device)
        stops = StopCriteria(self.stop_ids(), self.tokenizer, settings.stop)
        with torch.random.fork_rng(), _plain_generation(self.model, stops.ids, self._padding):
            torch.manual_seed(int(hash_keys(settings.seed, request.step)) % 2**63)
            generated = self.model.generate(
                **inputs,
                max_new_tokens=settings.max_completion_length,
                do_sample=not settings.greedy,
                **_truncation(settings),
                repetition_penalty=settings.repetition_penalty,
                suppress_tokens=self.suppressed_ids().tolist(),
                stop_strings=list(settings.stop) or None,
                tokenizer=self.tokenizer,
                return_dict_in_generate=True,
                output_logits=True,
                output_scores=True,
            )
        tokens = generated.sequences[:, inputs["input_ids"].shape[1] :]  # [B, T]
        full = torch.stack(generated.logits, 1).float() / settings.temperature  # [B, T, V]
        logp, sampling_logp = (
            scores.log_softmax(-1).gather(-1, tokens[..., None])[..., 0].tolist()
            for scores in (full, torch.stack(generated.scores, 1).float())
        )
        return [_cut(*each, stops) for each in zip(tokens.tolist(), logp, sampling_logp, strict=True)]

    @property
    def _padding(self) -> int:
        """The token behind the end of a completion, and before a prompt."""
        return self.model.generation_config.pad_token_id or self.tokenizer.pad_token_id or 0

    def _inputs(self, prompts: Sequence[Prompt], device: torch.device) -> dict[str, Tensor]:
        width = max(len(p.input_ids) for p in prompts)
        padding = self._padding
        ids = [pad(p.input_ids, (width - len(p.input_ids), 0), value=padding) for p in prompts]
        masks = [pad(torch.ones_like(p.input_ids), (width - len(p.input_ids), 0)) for p in prompts]
        input_ids = torch.stack(ids)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.stack(masks),
            **self.family.generation_inputs(self.model, input_ids, [p.images for p in prompts]),
        }
        return {name: value.to(device) for name, value in inputs.items()}


def _truncation(settings: SamplingSettings) -> dict[str, Any]:
    if settings.greedy:
        return dict.fromkeys(("temperature", "top_k", "top_p", "min_p"))
    options = {name: getattr(settings, name) for name in ("temperature", "top_k", "top_p")}
    return {**options, "min_p": settings.min_p or None}


def _cut(tokens: list[int], logp: list[float], sampling_logp: list[float], stops: StopCriteria) -> SampledCompletion:
    """Return a completion without the padding after its end."""
    end = stops.find_end(tokens)
    reason = "length" if end is None else "stop"
    return SampledCompletion(tokens[:end], logp[:end], sampling_logp[:end], reason)
