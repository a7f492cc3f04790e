"""What every rollout engine offers: prompts -> groups of completions with their log-probs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import torch

from vlmr1.models.attention import autocast
from vlmr1.models.family import ModelFamily
from vlmr1.models.features import FeatureCache
from vlmr1.rollout.sampling import SamplingSettings
from vlmr1.types import Completion, Group, Prompt

TAIL = 64  # tokens at the end of a completion in which a stop text is looked for


@dataclass(frozen=True)
class Request:
    """What a rollout is asked for; `step` varies the draws."""

    prompts: Sequence[Prompt]
    num_generations: int
    settings: SamplingSettings
    step: int


@dataclass(frozen=True)
class Drawn:
    """One completion in numbers: tokens, their log-probs, and "stop" or "length"."""

    tokens: list[int]
    logp: list[float]
    sampling_logp: list[float]
    finish_reason: str


@dataclass
class RolloutStats:
    """Of one `generate`."""

    seconds: float = 0.0
    tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    kv_peak_mib: float = 0.0
    sent_back: int = 0  # groups that were drawn again because the KV cache was full
    out_of_memory: int = 0  # times that the KV cache was halved

    def __add__(self, other: RolloutStats) -> RolloutStats:
        """Of both: what was spent adds up."""
        mine, others = asdict(self), asdict(other)
        sums: dict[str, Any] = {name: value + others[name] for name, value in mine.items()}
        sums["kv_peak_mib"] = max(self.kv_peak_mib, other.kv_peak_mib)
        return RolloutStats(**sums)

    def values(self) -> dict[str, float]:
        """By name, as metrics of a step."""
        return {
            "rollout/tokens_per_second": self.tokens / self.seconds,
            "rollout/prefill_seconds": self.prefill_seconds,
            "rollout/decode_seconds": self.decode_seconds,
            "rollout/kv_peak_mib": self.kv_peak_mib,
            "rollout/sent_back": float(self.sent_back),
            "rollout/out_of_memory": float(self.out_of_memory),
        }


class Stops:
    """What ends a completion: the stop tokens of the model, or a text of the settings."""

    def __init__(self, model: Any, tokenizer: Any, texts: Sequence[str]):
        self.ids = frozenset(stop_ids(model))
        self.texts = texts
        self.tokenizer = tokenizer

    def end(self, tokens: Sequence[int], looked: int = 0) -> int | None:
        """The length at which these tokens end, or None; the first `looked` are known not to end them."""
        for length in range(looked + 1, len(tokens) + 1):
            if tokens[length - 1] in self.ids:
                return length
            if self.texts:
                text = self.tokenizer.decode(tokens[max(0, length - TAIL) : length])
                if any(stop in text for stop in self.texts):
                    return length
        return None


class RolloutEngine(ABC):
    """Draws `num_generations` completions for each prompt from the present weights."""

    def __init__(
        self,
        model: Any,
        family: ModelFamily,
        tokenizer: Any,
        *,
        dtype: torch.dtype | None = None,
        features: FeatureCache | None = None,
        kv_mib: float | None = None,
        cuda_graphs: bool | None = None,
    ):
        self.model = model
        self.family = family
        self.tokenizer = tokenizer
        self.dtype = dtype  # of autocast
        self.features = features  # of a frozen tower
        self.kv_mib = kv_mib  # budget of the KV cache; None: what the prompts need, on a GPU half of what is free
        self.cuda_graphs = cuda_graphs  # of decode steps; None: where they can be
        self.stats = RolloutStats()

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Prompt], num_generations: int, settings: SamplingSettings, *, step: int = 0
    ) -> list[Group]:
        """P prompts -> P groups of `num_generations` completions; `step` varies the draws."""
        training, clock = self.model.training, perf_counter()
        self.stats = RolloutStats()
        self.model.eval()
        try:
            with autocast(self.model.device, self.dtype):
                drawn = self.draw(Request(prompts, num_generations, settings, step))
        finally:
            self.model.train(training)
        self.stats.seconds = perf_counter() - clock
        self.stats.tokens = sum(len(each.tokens) for each in drawn)
        completions = [self._completion(each) for each in drawn]
        groups = (completions[i * num_generations : (i + 1) * num_generations] for i in range(len(prompts)))
        return [Group(prompt, tuple(group)) for prompt, group in zip(prompts, groups, strict=True)]

    @abstractmethod
    def draw(self, request: Request) -> list[Drawn]:
        """[P*G] completions, those of a prompt adjacent."""

    def banned(self) -> torch.Tensor:
        """Token ids that are never drawn."""
        return torch.tensor(self.family.placeholder_ids(self.model, self.tokenizer), device=self.model.device)

    def _completion(self, drawn: Drawn) -> Completion:
        ids = torch.tensor(drawn.tokens)
        return Completion(
            token_ids=ids,
            logp=torch.tensor(drawn.logp),
            sampling_logp=torch.tensor(drawn.sampling_logp),
            text=self.tokenizer.decode(ids, skip_special_tokens=True),
            finish_reason=drawn.finish_reason,
        )


def stop_ids(model: Any) -> list[int]:
    """The tokens that end a completion, from the model's generation config."""
    eos = model.generation_config.eos_token_id
    return [eos] if isinstance(eos, int) else list(eos or [])
