"""What every rollout engine offers: prompts -> groups of completions with their log-probs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmr1.models.adapter import Adapter
from vlmr1.models.attention import autocast
from vlmr1.models.features import FeatureCache
from vlmr1.rollout.sampling import SamplingSettings
from vlmr1.types import Completion, Group, Prompt


class RolloutEngine(ABC):
    """Draws `num_generations` completions for each prompt from the present weights."""

    def __init__(
        self,
        model: Any,
        adapter: Adapter,
        tokenizer: Any,
        *,
        dtype: torch.dtype | None = None,
        features: FeatureCache | None = None,
    ):
        self.model = model
        self.adapter = adapter
        self.tokenizer = tokenizer
        self.dtype = dtype  # of autocast
        self.features = features  # of a frozen tower

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Prompt], num_generations: int, settings: SamplingSettings, *, step: int = 0
    ) -> list[Group]:
        """P prompts -> P groups of `num_generations` completions; `step` varies the draws."""
        training = self.model.training
        self.model.eval()
        with autocast(self.model.device, self.dtype):
            drawn = self.draw(prompts, num_generations, settings, step)
        self.model.train(training)
        completions = completions_of(*drawn, stop_ids(self.model), self.tokenizer)
        return groups_of(prompts, completions, num_generations)

    @abstractmethod
    def draw(
        self, prompts: Sequence[Prompt], num_generations: int, settings: SamplingSettings, step: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T] tokens, logp and sampling_logp; what follows a stop token is noise."""


def stop_ids(model: Any) -> list[int]:
    """The tokens that end a completion, from the model's generation config."""
    eos = model.generation_config.eos_token_id
    return [eos] if isinstance(eos, int) else list(eos or [])


def completions_of(
    tokens: Tensor, logp: Tensor, sampling_logp: Tensor, stops: Sequence[int], tokenizer: Any
) -> list[Completion]:
    """Cut [B, T] tokens after their first stop token; its absence means the length limit was met."""
    is_stop = torch.isin(tokens, torch.tensor(list(stops), device=tokens.device))
    stopped = is_stop.any(-1)
    lengths = torch.where(stopped, is_stop.int().argmax(-1) + 1, tokens.shape[1]).tolist()
    tokens, logp, sampling_logp = tokens.cpu(), logp.cpu(), sampling_logp.cpu()
    out = []
    for i, length in enumerate(lengths):
        ids = tokens[i, :length].clone()
        out.append(
            Completion(
                token_ids=ids,
                logp=logp[i, :length].clone(),
                sampling_logp=sampling_logp[i, :length].clone(),
                text=tokenizer.decode(ids, skip_special_tokens=True),
                finish_reason="stop" if bool(stopped[i]) else "length",
            )
        )
    return out


def groups_of(prompts: Sequence[Prompt], completions: list[Completion], num_generations: int) -> list[Group]:
    """[P] prompts and their [P*G] completions, those of a prompt adjacent."""
    each = num_generations
    return [Group(prompt, tuple(completions[i * each : (i + 1) * each])) for i, prompt in enumerate(prompts)]
