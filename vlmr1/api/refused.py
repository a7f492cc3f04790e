"""Settings and arguments of TRL that cannot be honoured here, with the reason and what to use instead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from vlmr1.errors import SettingError

NO_EXPERTS = "models that route tokens to experts are not supported"
NO_TOOLS = "a completion is one turn of the model: tools and environments are not supported"
ADAPTIVE = "the weight of the entropy bonus is constant: set entropy_coef"
CONTINUOUS = "rollout_engine=native, the default, batches sequences continuously itself"
SAPO = "loss_type sapo is not supported"
VESPO = "loss_type vespo is not supported"
# Settings, by the reason for which another value than the default is refused.
REASONS = {
    "use_vllm": "rollout_engine=native takes the place of vLLM: leave use_vllm out",
    "fp16": "use bf16: float16 overflows without a scaled loss",
    "deepspeed": "start the script with `accelerate launch` and its DeepSpeed configuration",
    "fsdp": "start the script with `accelerate launch` and its FSDP configuration",
    "router_aux_loss_coef": NO_EXPERTS,
    "cast_lm_head_to_fp32": "the loss accumulates the head's products in float32, whatever the dtype of its weights",
    "ds3_gather_for_generation": "with ZeRO-3 all weights are gathered for a rollout",
    "cache_implementation": "rollout_engine=native has a KV cache of its own",
    "sapo_temperature_neg": SAPO,
    "sapo_temperature_pos": SAPO,
    "vespo_k_pos": VESPO,
    "vespo_lambda_pos": VESPO,
    "vespo_k_neg": VESPO,
    "vespo_lambda_neg": VESPO,
    "top_entropy_quantile": "the entropy of all tokens is not known before the loss, which is computed in one pass",
    "use_adaptive_entropy": ADAPTIVE,
    "entropy_coef_min": ADAPTIVE,
    "entropy_coef_max": ADAPTIVE,
    "entropy_coef_delta": ADAPTIVE,
    "entropy_target": ADAPTIVE,
    "max_tool_calling_iterations": NO_TOOLS,
    "off_policy_mask_threshold": "use importance_sampling_correction",
    "log_completions_hub_repo": "completions are in completions.jsonl of output_dir",
    "use_transformers_continuous_batching": CONTINUOUS,
    "transformers_continuous_batching_config": CONTINUOUS,
    "use_transformers_paged": CONTINUOUS,
}
# Arguments of the trainer.
ARGUMENTS = {
    "tools": NO_TOOLS,
    "rollout_func": "completions are drawn by rollout_engine; use stop_strings and the sampling settings",
    "environment_factory": NO_TOOLS,
}


def refused(config: Any) -> Iterator[str]:
    """Yield the settings of a GRPOConfig that cannot be honoured."""
    for name, reason in REASONS.items():
        value = getattr(config, name)
        if (value or None) != (type(config).__dataclass_fields__[name].default or None):
            yield f"{name} is {value!r}: {reason}"
    yield from refused_hub(config)
    if config.loss_type == "bnpo" and config.gradient_accumulation_steps > 1:
        yield (
            "loss_type=bnpo divides each pass by its own tokens in TRL, and gradient_accumulation_steps is "
            f"{config.gradient_accumulation_steps}: here an update is divided by all of its tokens. Use loss_type=dapo"
        )
    if config.entropy_coef and config.gradient_accumulation_steps > 1:
        yield (
            f"entropy_coef is {config.entropy_coef}: TRL takes the mean entropy of each pass, and "
            f"gradient_accumulation_steps is {config.gradient_accumulation_steps}: here it is that of an update. Use a "
            "larger per_device_train_batch_size, which tokens_per_pack divides into passes"
        )
    by_sequence = config.loss_type in ("grpo", "dr_grpo", "gspo") or config.importance_sampling_level == "sequence"
    if config.entropy_coef and by_sequence:
        yield (
            f"entropy_coef is {config.entropy_coef}: with loss_type={config.loss_type} and "
            f"importance_sampling_level={config.importance_sampling_level} TRL takes the mean entropy over all tokens, "
            "and here it has the weights of the loss. Use loss_type=dapo at token level"
        )


def refused_hub(config: Any) -> Iterator[str]:
    """Yield the settings of uploads that cannot be honoured."""
    if str(getattr(config.hub_strategy, "value", config.hub_strategy)) not in ("end", "every_save"):
        yield f"hub_strategy is {config.hub_strategy!r}: trainer.push_to_hub() uploads the model, and never checkpoints"


def refuse_arguments(given: Mapping[str, Any], config: type, reasons: Mapping[str, str]) -> None:
    """SettingError for the arguments of a trainer that cannot be honoured; `args` is of the class `config`."""
    faults = list(_refused_arguments(given, config, reasons))
    if faults:
        raise SettingError("\n".join(faults))


def _refused_arguments(given: Mapping[str, Any], config: type, reasons: Mapping[str, str]) -> Iterator[str]:
    for name, reason in reasons.items():
        if given.get(name) is not None:
            yield f"{name}: {reason}"
    model, args, callbacks, optimizers = (given[name] for name in ("model", "args", "callbacks", "optimizers"))
    if not isinstance(model, str | nn.Module):
        yield f"model is a {type(model).__name__}: give the name or directory of a model, or a model"
    if args is not None and not isinstance(args, config):
        kind = type(args)
        yield f"args is a {kind.__module__.split('.')[0]} {kind.__name__}: import {config.__name__} from vlmr1 too"
    if callbacks is not None and not isinstance(callbacks, list | tuple):
        yield f"callbacks is a {type(callbacks).__name__}: give a list"
    if not isinstance(optimizers, tuple | list) or len(optimizers) != 2:
        yield "optimizers must be a pair, (optimizer, scheduler), of which each may be None"
