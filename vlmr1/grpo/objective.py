"""Settings of the objective -> what the kernels are asked for; what contradicts is refused by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmr1.errors import SettingError
from vlmr1_kernels import GRPOSettings

if TYPE_CHECKING:
    from vlmr1.config import GRPOConfig

# Settings that only change what another one turns on.
NEEDS = {
    "ref_model_sync_steps": "sync_ref_model",
    "ref_model_mixup_alpha": "sync_ref_model",
    "dynamic_sampling_max_rounds": "dynamic_sampling",
    "importance_sampling_cap": "importance_sampling_correction",
}


def kernel_settings(config: GRPOConfig) -> GRPOSettings:
    """The objective of the loss. Where the KL is in the reward, it is not in the loss.

    Raises SettingError, or the kernels' ValueError where a setting has the same name there."""
    if not 0 <= config.epsilon <= 1:
        raise SettingError(f"epsilon is {config.epsilon}: it must be between 0 and 1")
    corrected = config.importance_sampling_correction != "none"
    if corrected and not config.importance_sampling_cap > 0:
        raise SettingError(f"importance_sampling_cap is {config.importance_sampling_cap}: it must be above 0")
    return GRPOSettings(
        loss_type=config.loss_type,
        epsilon_low=config.epsilon,
        epsilon_high=config.epsilon if config.epsilon_high is None else config.epsilon_high,
        delta=config.delta,
        beta=config.loss_beta,
        kl=config.kl,
        importance_level=config.importance_sampling_level or "token",
        tis_cap=config.importance_sampling_cap if corrected else None,
        entropy_coef=config.entropy_coef,
        temperature=config.temperature,
        max_completion_length=config.max_completion_length,
    )


def check_objective(config: GRPOConfig) -> None:
    """SettingError for what has no effect, or cannot be, with the others."""
    if config.beta < 0:
        raise SettingError(f"beta is {config.beta}: it must not be negative")
    if config.loss_type == "gspo" and config.importance_sampling_level == "token":
        raise SettingError("importance_sampling_level=token contradicts loss_type=gspo, whose ratio is of the sequence")
    if config.loss_type == "cispo" and config.epsilon != _default(config, "epsilon"):
        raise SettingError("epsilon has no effect with loss_type=cispo: epsilon_high caps its ratio")
    for name, switch in NEEDS.items():
        if getattr(config, switch) in (False, "none") and getattr(config, name) != _default(config, name):
            raise SettingError(f"{name} has no effect without {switch}")
    _check_signal(config)
    _check_reference(config)
    _check_correction(config)
    if config.dynamic_sampling_max_rounds < 1:
        raise SettingError(
            f"dynamic_sampling_max_rounds is {config.dynamic_sampling_max_rounds}: it must be at least 1"
        )


def _check_signal(config: GRPOConfig) -> None:
    """Which completions have a gradient."""
    if not config.skip_zero_advantage:
        return
    if config.loss_beta > 0:
        raise SettingError(
            f"skip_zero_advantage needs beta 0, not {config.beta}: by the KL such completions have a gradient"
        )
    if config.entropy_coef != 0:
        raise SettingError(
            f"skip_zero_advantage needs entropy_coef 0, not {config.entropy_coef}: "
            "by the entropy bonus such completions have a gradient"
        )


def _check_reference(config: GRPOConfig) -> None:
    """What is done with the reference model, where there is one."""
    for name in ("kl_in_reward", "sync_ref_model"):
        if getattr(config, name) and config.beta == 0:
            raise SettingError(f"{name} needs beta above 0: with beta 0 there is no reference model")
    if config.sync_ref_model and (config.reference == "adapter" or (config.use_peft and config.reference == "auto")):
        raise SettingError("sync_ref_model needs reference=copy or offload: a policy with its adapter off stays")
    if config.ref_model_sync_steps < 1:
        raise SettingError(f"ref_model_sync_steps is {config.ref_model_sync_steps}: it must be at least 1")
    if not 0 < config.ref_model_mixup_alpha <= 1:
        raise SettingError(f"ref_model_mixup_alpha is {config.ref_model_mixup_alpha}: it must be above 0 and at most 1")


def _check_correction(config: GRPOConfig) -> None:
    if config.importance_sampling_correction == "none":
        return
    if config.old_logprobs != "recompute":
        raise SettingError(
            f"importance_sampling_correction={config.importance_sampling_correction} needs old_logprobs=recompute: "
            "with old_logprobs=rollout the engine's log-probs are in the ratio itself"
        )


def _default(config: GRPOConfig, name: str) -> object:
    return type(config).__dataclass_fields__[name].default
