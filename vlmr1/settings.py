"""What the settings of a run may be, one by one and together; what cannot work is refused by name.

Of the objective: `objective.py`; of parameters, precision and memory: `memory/settings.py`; of several processes:
`scale/sharded.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers.trainer_utils import SaveStrategy

from vlmr1.data.templates import question_text
from vlmr1.errors import SettingError
from vlmr1.grpo.objective import check_objective
from vlmr1_kernels.registry import ImplementationError, parse_choices

if TYPE_CHECKING:
    from vlmr1.config import GRPOConfig

AT_LEAST_ONE = ("prompts_per_device", "steps_per_generation", "num_iterations", "max_completion_length")
AT_LEAST_ONE += ("tokens_per_pack", "max_nonfinite", "max_prompt_length", "min_pixels", "max_pixels", "max_anyres_num")
ABOVE_ZERO = ("temperature", "repetition_penalty", "rollout_kv_mib", "rollout_logp_alarm", "reward_timeout")
NOT_NEGATIVE = ("log_completions", "reward_workers")


def check_settings(config: GRPOConfig) -> None:
    """SettingError where a value is out of range or contradicts another; fills in what follows from them."""
    _check_ranges(config)
    _check_data(config)
    _check_rewards(config)
    _check_sampling(config)
    _check_steps(config)
    _check_evaluation(config)
    check_objective(config)


def _check_ranges(config: GRPOConfig) -> None:
    if config.num_generations < 2:
        raise SettingError(
            f"num_generations is {config.num_generations}: a group needs at least 2 completions to compare"
        )
    for name in AT_LEAST_ONE:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise SettingError(f"{name} is {value}: it must be at least 1")
    for name in ABOVE_ZERO:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise SettingError(f"{name} is {value}: it must be above 0")
    for name in NOT_NEGATIVE:
        if getattr(config, name) < 0:
            raise SettingError(f"{name} is {getattr(config, name)}: it must not be negative")


def _check_data(config: GRPOConfig) -> None:
    if config.overlong_prompts == "filter" and config.max_prompt_length is None:
        raise SettingError("overlong_prompts=filter needs max_prompt_length")
    if not 0 <= config.val_split_ratio < 1:
        raise SettingError(f"val_split_ratio is {config.val_split_ratio}: it must be at least 0 and below 1")
    if config.min_pixels is not None and config.max_pixels is not None and config.min_pixels > config.max_pixels:
        raise SettingError(f"min_pixels is {config.min_pixels}: it is above max_pixels, {config.max_pixels}")
    question_text(config.question_template)


def _check_rewards(config: GRPOConfig) -> None:
    if config.reward_mode == "vlm_r1" and config.box_coordinates != "auto":
        raise SettingError(
            f"box_coordinates is {config.box_coordinates!r} with reward_mode vlm_r1, whose code converts boxes or not "
            "by the reward's name: leave it at auto"
        )
    config.accu_reward_method = [name for joint in config.accu_reward_method for name in joint.split(":")]
    if not config.accu_reward_method:
        raise SettingError("accu_reward_method is empty: name one method, or one for each data file")
    config.rewards()
    if config.reward_weights is not None and len(config.reward_weights) != len(config.reward_funcs):
        raise SettingError(
            f"reward_weights has {len(config.reward_weights)} values for {len(config.reward_funcs)} reward_funcs"
        )


def _check_sampling(config: GRPOConfig) -> None:
    if config.top_k < 0:
        raise SettingError(f"top_k is {config.top_k}: it must not be negative; 0 turns it off")
    if not 0 < config.top_p <= 1:
        raise SettingError(f"top_p is {config.top_p}: it must be above 0 and at most 1")
    if not 0 <= config.min_p <= 1:
        raise SettingError(f"min_p is {config.min_p}: it must be between 0 and 1")
    if "" in config.stop_strings:
        raise SettingError("stop_strings holds an empty text: it would end every completion")
    device, engine = config.device.type, config.rollout_engine
    if config.cuda_graphs and (device != "cuda" or engine != "native"):
        raise SettingError(f"cuda_graphs needs a GPU and rollout_engine native: this is {device}, {engine}")
    if config.rollout_kv_mib is not None and engine != "native":
        raise SettingError(f"rollout_kv_mib needs rollout_engine native, it is {engine}")


def _check_steps(config: GRPOConfig) -> None:
    if config.save_strategy == SaveStrategy.BEST:
        raise SettingError("save_strategy is 'best': no checkpoint is chosen by an evaluation; use 'steps' or 'epoch'")
    if config.steps_per_generation * config.num_iterations > 1:
        for name, value in (("ignore_data_skip", False), ("dataloader_in_order", True)):
            if getattr(config, name) != value:
                raise SettingError(
                    f"{name}={not value} cannot be, where a generation serves several updates "
                    "(steps_per_generation, num_iterations): prompts and updates would not meet"
                )
    if config.full_determinism and config.device.type == "cuda":
        raise SettingError("full_determinism has no effect on a GPU yet: sampling uses sums that vary there")
    if config.share_prompt and not config.share_vision:
        raise SettingError("share_vision=false needs share_prompt=false: a prompt computed once has its image once")
    try:
        parse_choices(config.kernels)
    except ImplementationError as error:
        raise SettingError(f"kernels: {error}") from error


def _check_evaluation(config: GRPOConfig) -> None:
    if config.eval_steps is not None:
        if config.eval_steps < 1 or config.eval_steps != int(config.eval_steps):
            raise SettingError(f"eval_steps is {config.eval_steps:g}: it must be a whole number, at least 1")
        config.eval_steps = int(config.eval_steps)
    if config.eval_limit is not None and config.eval_limit < 1:
        raise SettingError(f"eval_limit is {config.eval_limit}: it must be at least 1")
    if config.eval_image_folders and not config.eval_data_file_paths:
        raise SettingError("eval_image_folders needs eval_data_file_paths")
    for name in ("eval_data_file_paths", "eval_limit"):
        if getattr(config, name) and config.eval_steps is None and not config.eval_on_start:
            raise SettingError(f"{name} needs eval_steps or eval_on_start: nothing is evaluated without")
