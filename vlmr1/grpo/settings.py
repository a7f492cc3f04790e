"""Settings of the algorithm: packs, batches, the reference model, the objective."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from vlmr1.errors import SettingError
from vlmr1.types import Settings, setting
from vlmr1_kernels import GRPOSettings
from vlmr1_kernels.registry import ImplementationError, parse_choices


@dataclass
class PackSettings(Settings):
    """Prompts of an update, and what their completions share; all of `share_*` and `pack` off is the naive trainer."""

    group = "Batches"
    shared = ("full_determinism",)
    if TYPE_CHECKING:

        @property
        def full_determinism(self) -> bool: ...

    prompts_per_device: int = setting(8, "prompts that each device works on in one update")
    share_vision: bool = setting(True, "encode an image once a group, not G times")
    share_prompt: bool = setting(True, "compute a prompt once a group, not G times")
    pack: bool = setting(True, "several groups in one row, without padding")
    tokens_per_pack: int = setting(16384, "tokens of one packed row, at most")
    kernels: str = setting("", "op=impl,... ; see `vlmr1 doctor`")

    def check(self) -> Iterator[str]:
        yield from self.at_least(1, "prompts_per_device", "tokens_per_pack")
        if self.share_prompt and not self.share_vision:
            yield "share_vision=false needs share_prompt=false: share_prompt already shares the image"
        try:
            parse_choices(self.kernels)
        except ImplementationError as error:
            yield f"kernels: {error}"

    def check_device(self, device: str) -> Iterator[str]:
        if self.full_determinism and device == "cuda":
            yield "full_determinism has no effect on a GPU yet: kernels and sampling use sums that vary there"


@dataclass
class BatchSettings(PackSettings):
    """Updates and prompts of a generation."""

    group = "Batches"

    steps_per_generation: int = setting(
        1, "updates that share one generation, each with prompts_per_device of its prompts"
    )
    num_iterations: int = setting(1, "times that updates go over the prompts of a generation")
    dynamic_sampling: bool = setting(False, "replace groups whose rewards are all equal by groups of other prompts")
    dynamic_sampling_max_rounds: int = setting(4, "rounds after the first, at most")

    @property
    def updates_per_generation(self) -> int:
        """Updates of the rows of one generation, each of which `num_iterations` repeats."""
        return self.steps_per_generation

    def check(self) -> Iterator[str]:
        yield from self.at_least(1, "steps_per_generation", "num_iterations")
        if not self.dynamic_sampling and not self.is_default("dynamic_sampling_max_rounds"):
            yield "dynamic_sampling_max_rounds has no effect without dynamic_sampling"
        yield from self.at_least(1, "dynamic_sampling_max_rounds")

    def check_device(self, device: str) -> Iterator[str]:
        return iter(())


@dataclass
class ReferenceSettings(Settings):
    """The reference model, which the KL is taken to."""

    group = "Reference model"
    if TYPE_CHECKING:

        @property
        def use_peft(self) -> bool: ...
        @property
        def adapter(self) -> str | None: ...

    beta: float = setting(0.04, "weight of the KL to the reference; 0: no reference model")
    reference: Literal["auto", "copy", "adapter", "offload"] = setting(
        "auto",
        "a copy, the policy with its adapter switched off, or a copy in host memory; auto: adapter with use_peft, else "
        "copy, also where the run starts from an adapter",
    )
    sync_ref_model: bool = setting(False, "update the reference from the policy")
    ref_model_sync_steps: int = setting(512, "updates of the policy between two of the reference")
    ref_model_mixup_alpha: float = setting(0.6, "reference = alpha * policy + (1 - alpha) * reference")

    @property
    def reference_kind(self) -> Literal["none", "copy", "adapter", "offload"]:
        """The kind of reference that a run has. One that starts from an adapter has a copy of base and adapter."""
        if self.beta <= 0:
            return "none"
        if self.reference == "auto":
            return "adapter" if self.use_peft and self.adapter is None else "copy"
        return self.reference

    def check(self) -> Iterator[str]:
        if self.beta < 0:
            yield f"beta is {self.beta}: it must not be negative"
        if self.beta == 0 and self.reference != "auto":
            yield f"reference={self.reference} needs beta above 0: with beta 0 there is no reference"
        if self.beta == 0 and self.sync_ref_model:
            yield "sync_ref_model needs beta above 0: with beta 0 there is no reference model"
        for name in ("ref_model_sync_steps", "ref_model_mixup_alpha"):
            if not self.sync_ref_model and not self.is_default(name):
                yield f"{name} has no effect without sync_ref_model"
        yield from self.at_least(1, "ref_model_sync_steps")
        if not 0 < self.ref_model_mixup_alpha <= 1:
            yield f"ref_model_mixup_alpha is {self.ref_model_mixup_alpha}: it must be above 0 and at most 1"


class _Shared(Settings):
    shared = ("temperature", "max_completion_length")
    if TYPE_CHECKING:
        temperature: float
        max_completion_length: int
        num_iterations: int

        @property
        def updates_per_generation(self) -> int: ...


@dataclass
class ObjectiveSettings(ReferenceSettings, _Shared):
    """The loss, and which completions are in it."""

    group = "Objective"

    loss_type: Literal["grpo", "bnpo", "dapo", "dr_grpo", "cispo", "gspo"] = setting("grpo", "variant of the loss")
    scale_rewards: Literal["group", "batch", "none"] = setting(
        "group", "advantages are divided by the standard deviation of the rewards of a group, of the batch, or not"
    )
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = setting(
        "sum_then_normalize",
        "advantages from the weighted sum of the rewards, or from each reward normalized over its group (GDPO)",
    )
    importance_sampling_level: Literal["token", "sequence"] | None = setting(
        None, "level of the ratio; default: token, with gspo sequence"
    )
    kl_estimator: Literal["k1", "k2", "k3"] = setting("k3", "estimator of the KL")
    use_bias_correction_kl: bool = setting(
        False, "multiply the KL in the loss by the ratio, which makes its gradient unbiased (k3, token level)"
    )
    kl_in_reward: bool = setting(False, "subtract the KL, summed over a completion, from its reward: no KL in the loss")
    epsilon: float = setting(0.2, "lower clip of the ratio, and upper clip unless epsilon_high is set")
    epsilon_high: float | None = setting(None, "upper clip of the ratio; default: epsilon")
    delta: float | None = setting(None, "two-sided clip: cap of the unclipped ratio, above 1")
    entropy_coef: float = setting(0.0, "weight of the entropy bonus in the loss")
    mask_truncated_completions: bool = setting(False, "leave completions at the length limit out of the loss")
    skip_zero_advantage: bool | None = setting(
        None, "leave completions of advantage 0 out of the policy pass; default: where they have no gradient"
    )
    old_logprobs: Literal["rollout", "recompute"] = setting(
        "rollout", "denominator of the ratio: the rollout engine's, or from a forward before the first update"
    )
    rollout_logp_warn_threshold: float = setting(
        0.1, "warn where rollout and policy log-probs differ by more, mean over tokens in nats"
    )
    importance_sampling_correction: Literal[
        "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
    ] = setting("none", "weight of the loss: ratio of policy to rollout engine, with a cap")
    importance_sampling_cap: float = setting(3.0, "a greater weight is set to the cap (truncate), or to 0 (mask)")

    def check(self) -> Iterator[str]:
        if self.loss_type == "gspo" and self.importance_sampling_level == "token":
            yield "importance_sampling_level=token contradicts loss_type=gspo, whose ratio is of the sequence"
        if self.loss_type == "cispo" and not self.is_default("epsilon"):
            yield "epsilon has no effect with loss_type=cispo: epsilon_high caps its ratio"
        elif not 0 <= self.epsilon <= 1:
            yield f"epsilon is {self.epsilon}: it must be between 0 and 1"
        if self.multi_objective_aggregation == "normalize_then_sum":
            if not self.is_default("scale_rewards"):
                yield "scale_rewards has no effect with multi_objective_aggregation=normalize_then_sum"
            if self.kl_in_reward:
                yield "kl_in_reward needs multi_objective_aggregation=sum_then_normalize: the KL is no reward function"
        if self.beta == 0 and self.kl_in_reward:
            yield "kl_in_reward needs beta above 0: with beta 0 there is no reference model"
        if self.use_bias_correction_kl and self.loss_beta == 0:
            yield "use_bias_correction_kl needs a KL in the loss: beta above 0, and kl_in_reward=false"
        if self.skip_zero_advantage and self.loss_beta > 0:
            yield f"skip_zero_advantage needs beta 0, not {self.beta}: by the KL such completions have a gradient"
        if self.skip_zero_advantage and self.entropy_coef != 0:
            yield (
                f"skip_zero_advantage needs entropy_coef 0, not {self.entropy_coef}: by the entropy bonus such "
                "completions have a gradient"
            )
        yield from self.above_zero("rollout_logp_warn_threshold")
        correction = self.importance_sampling_correction
        if correction == "none":
            if not self.is_default("importance_sampling_cap"):
                yield "importance_sampling_cap has no effect without importance_sampling_correction"
        elif self.old_logprobs != "recompute":
            yield (
                f"importance_sampling_correction={correction} needs old_logprobs=recompute: with old_logprobs=rollout "
                "the engine's log-probs are in the ratio itself"
            )
        if correction != "none":
            yield from self.above_zero("importance_sampling_cap")

    def objective(self) -> GRPOSettings:
        """The objective of the loss, for the kernels; SettingError for what they refuse."""
        corrected = self.importance_sampling_correction != "none"
        try:
            return GRPOSettings(
                loss_type=self.loss_type,
                epsilon_low=self.epsilon,
                epsilon_high=self.epsilon if self.epsilon_high is None else self.epsilon_high,
                delta=self.delta,
                beta=self.loss_beta,
                kl=self.kl_estimator,
                use_bias_correction_kl=self.use_bias_correction_kl,
                importance_level=self.importance_sampling_level or "token",
                tis_cap=self.importance_sampling_cap if corrected else None,
                entropy_coef=self.entropy_coef,
                temperature=self.temperature,
                max_completion_length=self.max_completion_length,
            )
        except ValueError as error:
            raise SettingError(str(error)) from error

    @property
    def loss_beta(self) -> float:
        """Weight of the KL in the loss: 0 where it is in the reward."""
        return 0.0 if self.kl_in_reward else self.beta

    @property
    def has_old_pass(self) -> bool:
        """Whether a pass computes the log-probs of the old policy. With one update a generation the update's own
        forward computes them, unless they are needed before."""
        needed = self.kl_in_reward or self.importance_sampling_correction != "none"
        several = self.updates_per_generation * self.num_iterations > 1
        return self.old_logprobs == "recompute" and (needed or several)

    @property
    def skips_zero_advantage(self) -> bool:
        """`skip_zero_advantage`, or its default: whether the advantage is a completion's only source of gradient."""
        only = self.loss_beta == 0 and self.entropy_coef == 0
        return only if self.skip_zero_advantage is None else self.skip_zero_advantage
