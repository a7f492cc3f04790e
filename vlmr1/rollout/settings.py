"""Settings of rollouts: how completions are sampled, and by which engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from vlmr1.rollout.sampling import SamplingSettings
from vlmr1.types import Settings, setting

KEPT_SHARE = 0.05  # of the device's memory: a larger KV cache is freed before the update
COPIES_SHARE = 0.1  # the same of copies of weights in the dtype of autocast, which kept graphs read


class _Shared(Settings):
    shared = ("seed", "use_peft", "load_in_4bit")
    if TYPE_CHECKING:
        seed: int

        @property
        def use_peft(self) -> bool: ...
        @property
        def load_in_4bit(self) -> bool: ...


@dataclass
class RolloutSettings(_Shared):
    """Generation of completions."""

    group = "Rollout"

    num_generations: int = setting(8, "completions of a prompt (G), at least 2")
    max_completion_length: int = setting(256, "tokens of a completion, at most")
    temperature: float = setting(1.0, "temperature of sampling and of the policy's log-probs")
    top_k: int = setting(0, "sample from the k most probable tokens; 0: from all")
    top_p: float = setting(1.0, "sample from the most probable tokens that together have this probability")
    min_p: float = setting(0.0, "sample from tokens with at least this share of the greatest probability")
    repetition_penalty: float = setting(1.0, "penalty of tokens that are in prompt or completion already")
    stop_strings: list[str] = setting([], "texts that end a completion")
    skip_special_tokens: bool = setting(
        False, "leave all special tokens out of a completion's text, not only those of end and padding"
    )
    rollout_engine: Literal["native", "transformers"] = setting(
        "native", "native shares the prompt's KV; transformers calls `generate`"
    )
    rollout_kv_mib: float | None = setting(
        None, "MiB of keys and values; default: what is needed, on a GPU up to half of the free memory"
    )
    lora_merge_rollout: bool = setting(False, "merge the adapter for the rollout; costs a copy of its layers' weights")
    cuda_graphs: bool | None = setting(None, "decode steps as CUDA graphs; default: on a GPU, with the native engine")

    rollout_keep_cache: bool | None = setting(
        None,
        "keep KV cache and CUDA graphs between generations; default: on a GPU, where the cache takes at most 5% of its "
        "memory, copied weights 10%, and weights stay at their addresses",
    )

    def check(self) -> Iterator[str]:
        if self.num_generations < 2:
            yield f"num_generations is {self.num_generations}: a group needs at least 2 completions to compare"
        yield from self.at_least(1, "max_completion_length")
        yield from self.above_zero("temperature", "repetition_penalty", "rollout_kv_mib")
        if self.top_k < 0:
            yield f"top_k is {self.top_k}: it must not be negative; 0 turns it off"
        if not 0 < self.top_p <= 1:
            yield f"top_p is {self.top_p}: it must be above 0 and at most 1"
        if not 0 <= self.min_p <= 1:
            yield f"min_p is {self.min_p}: it must be between 0 and 1"
        if "" in self.stop_strings:
            yield "stop_strings holds an empty text: it would end every completion"
        yield from self.merge_faults()
        if self.rollout_engine != "native":
            if self.cuda_graphs:
                yield f"cuda_graphs needs rollout_engine native, it is {self.rollout_engine}"
            if self.rollout_kv_mib is not None:
                yield f"rollout_kv_mib needs rollout_engine native, it is {self.rollout_engine}"
            if self.rollout_keep_cache:
                yield f"rollout_keep_cache needs rollout_engine native, it is {self.rollout_engine}"

    def merge_faults(self) -> Iterator[str]:
        """Yield why an adapter cannot be merged for rollouts; a script's trainer knows it when it has the model."""
        if self.lora_merge_rollout and not self.use_peft:
            yield "lora_merge_rollout needs use_peft (in Python peft_config): there is no adapter without it"
        elif self.lora_merge_rollout and self.load_in_4bit:
            yield "lora_merge_rollout cannot be used with load_in_4bit (4-bit weights): they would be rounded again"
        if self.lora_merge_rollout and self.rollout_keep_cache:
            yield "rollout_keep_cache cannot be used with lora_merge_rollout: each merge has weights at new addresses"

    def check_device(self, device: str) -> Iterator[str]:
        if self.cuda_graphs and device != "cuda":
            yield f"cuda_graphs needs a GPU: this is {device}"

    def sampling(self) -> SamplingSettings:
        """Return the sampling settings of the run's rollouts."""
        shared = ("max_completion_length", "temperature", "seed", "top_k", "top_p", "min_p", "repetition_penalty")
        return SamplingSettings(**{name: getattr(self, name) for name in shared}, stop=tuple(self.stop_strings))
