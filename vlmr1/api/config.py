"""TRL's GRPOConfig: its names, types, defaults and arithmetic on the settings of `vlmr1.config.GRPOConfig`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from vlmr1.api.refused import refused
from vlmr1.api.script import ScriptSettings, without
from vlmr1.api.script import taken as _taken
from vlmr1.config import GRPOConfig as CoreConfig
from vlmr1.errors import SettingError
from vlmr1.evaluation.settings import EvaluationSettings
from vlmr1.rollout.sampling import SamplingSettings

# Settings of the command line that a Python script gives in another way: rows, model and rewards are arguments of the
# trainer, and TRL's scripts have the same names in another part of their parser.
ELSEWHERE = ("model_name_or_path", "model_revision", "attn_implementation", "model_dtype", "load_in_4bit", "use_peft")
ELSEWHERE += ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_modules_to_save", "lora_vision")
ELSEWHERE += ("use_rslora", "use_dora", "adapter", "reward_funcs", "prompts_per_device")
ELSEWHERE += ("data_file_paths", "image_folders", "images_outside_folders", "sampling_strategy", "data_weights")
ELSEWHERE += ("streaming", "shuffle_buffer_size", "prompt_column", "solution_column", "image_column", "system_prompt")
ELSEWHERE += ("question_template", "check_images", "val_split_ratio", "min_pass_rate", "max_pass_rate")
ELSEWHERE += ("eval_data_file_paths", "eval_image_folders", "eval_limit")
# Keys of `generation_kwargs` and `model_init_kwargs`, and the settings that they are.
GENERATION = {"max_new_tokens": "max_completion_length", "stop_strings": "stop_strings"}
GENERATION |= {name: name for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")}
LOADING = {"dtype": "model_dtype", "torch_dtype": "model_dtype", "attn_implementation": "attn_implementation"}
LOADING |= {"revision": "model_revision", "trust_remote_code": "trust_remote_code"}
LOADING |= {"quantization_config": "quantization", "device_map": "device_map"}
# Settings of TrainingArguments that the command line has not, or has under other names.
KEPT = ("per_device_train_batch_size", "gradient_accumulation_steps", "per_device_eval_batch_size", "eval_strategy")
KEPT += (
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
    "hub_revision",
    "hub_strategy",
    "ddp_find_unused_parameters",
    "do_train",
)
KEPT += ("do_eval", "torch_empty_cache_steps")

if TYPE_CHECKING:
    Base = CoreConfig
else:
    Base = without(CoreConfig, ELSEWHERE, __name__)


@dataclass
class GRPOConfig(ScriptSettings, Base):
    """Settings of a GRPO run with the names, defaults and units of TRL. A setting that cannot be honoured is an error
    that names it. Settings of vlmr1 that TRL has not may be given too."""

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*CoreConfig._VALID_DICT_FIELDS, "model_init_kwargs", "generation_kwargs"]
    also_supported = frozenset(KEPT)
    not_checked = (EvaluationSettings,)
    in_dicts: ClassVar[dict[str, dict[str, str]]] = {"model_init_kwargs": LOADING, "generation_kwargs": GENERATION}

    # TRL's defaults
    output_dir: str | None = "trainer_output"
    loss_type: str = "dapo"  # type: ignore[assignment]
    beta: float = 0.0
    max_completion_length: int = 512
    importance_sampling_level: str = "token"  # type: ignore[assignment]
    scale_rewards: str = "group"  # type: ignore[assignment]
    use_bias_correction_kl: bool = True
    min_p: float | None = None  # type: ignore[assignment]
    old_logprobs: str = "recompute"  # type: ignore[assignment]
    skip_special_tokens: bool = True
    logging_steps: float = 10
    save_steps: float = 500
    lr_scheduler_type: str = "linear"
    gradient_checkpointing: bool = True
    bf16: bool | None = None  # type: ignore[assignment]
    log_completions: bool = False  # type: ignore[assignment]
    # Batches: TRL counts completions of a forward pass, and passes
    steps_per_generation: int | None = None  # type: ignore[assignment]
    generation_batch_size: int | None = None
    num_generations_eval: int | None = None
    # Model, templates, dropout
    model_init_kwargs: dict | str | None = None
    generation_kwargs: dict | str | None = None
    disable_dropout: bool = False
    # Without effect here
    pad_to_multiple_of: int | str | None = _taken("auto")
    log_multimodal: bool = _taken(True)
    num_completions_to_print: int | None = _taken(None)
    log_unique_prompts: bool = _taken(False)
    # Without effect while use_vllm is False, as in TRL
    use_vllm: bool = _taken(False)
    vllm_mode: str = _taken("colocate")
    vllm_model_impl: str = _taken("vllm")
    vllm_enable_sleep_mode: bool = _taken(False)
    vllm_structured_outputs_regex: str | None = _taken(None)
    vllm_server_base_url: str | None = _taken(None)
    vllm_server_host: str = _taken("0.0.0.0")
    vllm_server_port: int = _taken(8000)
    vllm_server_timeout: float = _taken(240.0)
    vllm_group_port: int = _taken(51216)
    vllm_gpu_memory_utilization: float = _taken(0.3)
    vllm_max_model_length: int | None = _taken(None)
    vllm_tensor_parallel_size: int = _taken(1)
    vllm_importance_sampling_correction: bool = _taken(True)
    vllm_importance_sampling_mode: str = _taken("sequence_mask")
    vllm_importance_sampling_clip_max: float | None = _taken(3.0)
    vllm_importance_sampling_clip_min: float | None = _taken(None)
    vllm_importance_sampling_cap: float | None = _taken(None)
    # Refused unless they have these values
    router_aux_loss_coef: float | None = _taken(None)
    cast_lm_head_to_fp32: bool = _taken(False)
    ds3_gather_for_generation: bool = _taken(True)
    cache_implementation: str | None = _taken(None)
    sapo_temperature_neg: float = _taken(1.05)
    sapo_temperature_pos: float = _taken(1.0)
    vespo_k_pos: float = _taken(2.0)
    vespo_lambda_pos: float = _taken(3.0)
    vespo_k_neg: float = _taken(3.0)
    vespo_lambda_neg: float = _taken(2.0)
    top_entropy_quantile: float = _taken(1.0)
    use_adaptive_entropy: bool = _taken(False)
    entropy_coef_min: float = _taken(0.0)
    entropy_coef_max: float = _taken(1.0)
    entropy_coef_delta: float = _taken(0.005)
    entropy_target: float = _taken(0.2)
    max_tool_calling_iterations: int | None = _taken(None)
    off_policy_mask_threshold: float | None = _taken(None)
    log_completions_hub_repo: str | None = _taken(None)
    use_transformers_continuous_batching: bool = _taken(False)
    transformers_continuous_batching_config: dict | str | None = _taken(None)  # noqa: RUF009
    use_transformers_paged: bool = _taken(False)

    def __post_init__(self) -> None:
        self.reads_dtype = False  # whether the weights have the dtype of the checkpoint
        self.quantization: Any = None  # of model_init_kwargs
        if self.bf16 is None:  # on, but for machines without a GPU, where the library refuses it without use_cpu
            self.bf16 = not self.fp16 and (self.use_cpu or torch.cuda.is_available())
        self.scale_rewards = {True: "group", False: "none"}.get(self.scale_rewards, self.scale_rewards)  # type: ignore
        faults = [*refused(self), *self._batches(), *self.read_kwargs(), *self._evaluation()]
        # The trainer's loop must not group updates: an update is one step of it.
        self.accumulation, self.gradient_accumulation_steps = self.gradient_accumulation_steps, 1
        self.dataloader_drop_last = True  # TRL drops a last generation that is not whole
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "loss"
        asked = self._as_checked()
        try:
            super().__post_init__()
        except SettingError as error:
            named = {fault.split(" is ")[0] for fault in faults}
            faults += [each for each in str(error).splitlines() if each.split(" cannot be set")[0] not in named]
        for name, value in asked.items():
            setattr(self, name, value)
        if faults:
            raise SettingError("\n".join(dict.fromkeys(faults)))
        if self.generation_batch_size is None and self.steps_per_generation is not None:
            self.generation_batch_size = self.per_device_train_batch_size * self.world_size * self.steps_per_generation

    def _as_checked(self) -> dict[str, Any]:
        """Replace values by those that the checks of the command line know; return what they were."""
        known: dict[str, Any] = {"reward_weights": None}  # counted where the rewards are known
        known["log_completions"] = int(self.log_completions)
        known["lora_merge_rollout"] = False  # checked where the model is known
        known["min_p"], known["top_k"] = self.min_p or 0.0, self.top_k or 0
        known["use_bias_correction_kl"] = self.use_bias_correction_kl and self.beta > 0 and not self.kl_in_reward
        if self.model_dtype == "bfloat16":
            known["use_peft"] = True  # or the trainer refuses it, which knows whether an adapter is trained
        if self.loss_type == "gspo":
            known["importance_sampling_level"] = None
        if self.loss_type == "cispo":
            known["epsilon"] = 0.2  # without effect, as in TRL
        if not self.sync_ref_model:
            known |= {"ref_model_sync_steps": 512, "ref_model_mixup_alpha": 0.6}
        if self.multi_objective_aggregation == "normalize_then_sum":
            known["scale_rewards"] = "group"  # without effect, as in TRL
        if not self.push_to_hub:
            known |= {"hub_model_id": None, "hub_private_repo": None, "hub_revision": None}
        known |= {"per_device_train_batch_size": self.per_device_train_batch_size}
        if self.steps_per_generation is not None:
            known["steps_per_generation"] = self.updates_per_generation
        asked = {name: getattr(self, name) for name in known}
        for name, value in known.items():
            setattr(self, name, value)
        return asked

    def _batches(self) -> Iterator[str]:
        """Set `prompts_per_device` and `steps_per_generation` by TRL's numbers; yield what is wrong with them."""
        size, passes = self.per_device_train_batch_size, self.gradient_accumulation_steps
        steps = self.steps_per_generation
        if not all(isinstance(each, int) and each >= 1 for each in (size, passes, self.num_generations or 1)):
            yield "per_device_train_batch_size, gradient_accumulation_steps and num_generations must be at least 1"
            self.steps_per_generation = self.accumulation = 1
            return
        if self.generation_batch_size is not None:
            ranks = int(os.environ.get("WORLD_SIZE", "1"))
            if steps is not None:
                yield "generation_batch_size and steps_per_generation both say the size of a generation: give one"
            elif self.generation_batch_size % (size * ranks):
                yield (
                    f"generation_batch_size is {self.generation_batch_size}: it must be a multiple of "
                    f"per_device_train_batch_size on all processes, {size * ranks}"
                )
            steps = max(1, self.generation_batch_size // (size * ranks))
        self.steps_per_generation = steps = passes if steps is None else steps
        if self.num_generations and (size * passes) % self.num_generations:
            yield (
                "per_device_train_batch_size x gradient_accumulation_steps is "
                f"{size * passes} completions an update and device, no multiple of num_generations, "
                f"{self.num_generations}: a group is not split"
            )
        elif steps % passes and passes % steps:
            yield (
                f"steps_per_generation is {steps}: it must be a multiple of gradient_accumulation_steps, {passes}, or "
                "divide it"
            )
        else:
            self.prompts_per_device = max(1, size * passes // (self.num_generations or 1))
        self.accumulation = passes

    @property
    def updates_per_generation(self) -> int:
        return max(1, (self.steps_per_generation or 1) // self.accumulation)

    @property
    def completions_to_log(self) -> int:
        return self.prompts_per_device * self.num_generations * self.world_size if self.log_completions else 0

    def sampling(self) -> SamplingSettings:
        return replace(super().sampling(), min_p=self.min_p or 0.0, top_k=self.top_k or 0)
