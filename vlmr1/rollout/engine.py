"""Interface of the rollout engines: prompts -> groups of completions with their log-probs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field
from time import perf_counter
from typing import Any

import torch

from vlmr1.models.attention import autocast
from vlmr1.models.family import ModelFamily
from vlmr1.models.features import FeatureCache
from vlmr1.rollout.sampling import SamplingSettings
from vlmr1.rollout.stop_tokens import decode, stop_token_ids
from vlmr1.types import Completion, Group, Prompt

STOP_TEXT_WINDOW = 64  # last tokens of a completion that are searched for a stop text


@dataclass(frozen=True)
class Request:
    """Arguments of a rollout. The random numbers depend on `settings.seed` and `step`."""

    prompts: Sequence[Prompt]
    num_generations: int
    settings: SamplingSettings
    step: int


@dataclass(frozen=True)
class SampledCompletion:
    """A completion before decoding to text: tokens, their log-probs, and "stop" or "length"."""

    tokens: list[int]
    logp: list[float]
    sampling_logp: list[float]
    finish_reason: str


@dataclass
class RolloutStats:
    """Statistics of one `generate` call."""

    seconds: float = 0.0
    tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    kv_peak_mib: float = 0.0
    preemptions: int = 0  # groups moved to host memory for a time because the KV cache was full
    out_of_memory: int = 0  # times that the KV cache was halved
    captures: int = 0  # of CUDA graphs

    def __add__(self, other: RolloutStats) -> RolloutStats:
        """Sum of two rollouts' statistics; the KV peak is the larger one."""
        mine, others = asdict(self), asdict(other)
        sums: dict[str, Any] = {name: value + others[name] for name, value in mine.items()}
        sums["kv_peak_mib"] = max(self.kv_peak_mib, other.kv_peak_mib)
        return RolloutStats(**sums)

    def values(self) -> dict[str, float]:
        """Return the metrics of a training step by name."""
        names = ("prefill_seconds", "decode_seconds", "kv_peak_mib", "preemptions", "out_of_memory")
        values = {f"rollout/{name}": float(getattr(self, name)) for name in names}
        return {"rollout/tokens_per_second": self.tokens / self.seconds, **values}


class StopCriteria:
    """Ends a completion at one of the model's stop tokens or at a stop text."""

    def __init__(self, ids: frozenset[int], tokenizer: Any, texts: Sequence[str]):
        self.ids = ids
        self.texts = texts
        self.tokenizer = tokenizer

    def find_end(self, tokens: Sequence[int], checked: int = 0) -> int | None:
        """Return the length of the completion up to its first stop, or None; skip the first `checked` tokens."""
        for length in range(checked + 1, len(tokens) + 1):
            if tokens[length - 1] in self.ids:
                return length
            if self.texts:
                text = self.tokenizer.decode(tokens[max(0, length - STOP_TEXT_WINDOW) : length])
                if any(stop in text for stop in self.texts):
                    return length
        return None


@dataclass(eq=False, repr=False)
class RolloutEngine(ABC):
    """Samples completions from the model's current weights."""

    model: Any  # of transformers; in eval mode while it generates
    family: ModelFamily
    tokenizer: Any  # decodes completions and stop texts
    _: KW_ONLY
    dtype: torch.dtype | None = None  # of autocast; None: off
    features: FeatureCache | None = None  # of a frozen vision tower
    kv_mib: float | None = None  # of the KV cache; None: as the prompts need, on CUDA at most half the free memory
    cuda_graphs: bool | None = None  # capture decode steps; None: where supported
    keep_cache: bool | None = None  # between generations, with graphs; None: where they are useful and small
    chat_template: str | None = None  # of the processor; None: the tokenizer's
    skip_special_tokens: bool = False  # in the text of a completion; False: only those of end and padding
    fused_layers: str = "auto"  # "torch": decode steps run the stock forward
    ignore_eos: bool = False  # no token ends a completion: for measurements
    stats: RolloutStats = field(default_factory=RolloutStats, init=False)
    decode_forward: Any = field(default=None, init=False)  # a `DecodeForward`; None: decode steps run the stock forward

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Prompt], num_generations: int, settings: SamplingSettings, *, step: int = 0
    ) -> list[Group]:
        """Return one group of `num_generations` completions per prompt.

        MemoryShort if the KV budget does not hold one group, SettingError if CUDA graphs are not supported."""
        training, clock = self.model.training, perf_counter()
        self.stats = RolloutStats()
        self.model.eval()
        try:
            with autocast(self.model.device, self.dtype):
                sampled = self.sample(Request(prompts, num_generations, settings, step))
        finally:
            self.model.train(training)
        self.stats.seconds = perf_counter() - clock
        self.stats.tokens = sum(len(each.tokens) for each in sampled)
        stops = self.stop_ids()
        completions = [self._completion(each, stops) for each in sampled]
        groups = (completions[i * num_generations : (i + 1) * num_generations] for i in range(len(prompts)))
        return [Group(prompt, tuple(group)) for prompt, group in zip(prompts, groups, strict=True)]

    @abstractmethod
    def sample(self, request: Request) -> list[SampledCompletion]:
        """Return P * G completions, those of a prompt adjacent."""

    def free_cache(self) -> None:  # noqa: B027
        """Free what the engine keeps between generations; by default that is nothing."""

    def stop_ids(self) -> frozenset[int]:
        """Return the token ids that end a completion. SettingError where the model has none."""
        return frozenset() if self.ignore_eos else stop_token_ids(self.model, self.tokenizer, self.chat_template)

    def suppressed_ids(self) -> torch.Tensor:
        """Return the token ids that are never sampled: image and video placeholders."""
        return torch.tensor(self.family.placeholder_ids(self.model, self.tokenizer), device=self.model.device)

    def _completion(self, sampled: SampledCompletion, stops: frozenset[int]) -> Completion:
        return Completion(
            token_ids=torch.tensor(sampled.tokens),
            logp=torch.tensor(sampled.logp),
            sampling_logp=torch.tensor(sampled.sampling_logp),
            text=decode(self.tokenizer, sampled.tokens, stops, skip_special=self.skip_special_tokens),
            finish_reason=sampled.finish_reason,
        )
