"""The settings of a run. The command line and the recipes are derived from these dataclasses."""

from __future__ import annotations

from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Literal

from transformers import TrainingArguments

from vlmr1.data.templates import TEMPLATES
from vlmr1.errors import SettingError
from vlmr1.grpo.objective import kernel_settings
from vlmr1.models.settings import check_parameters
from vlmr1.rewards.judge import Judge
from vlmr1.rewards.settings import RewardSettings
from vlmr1.rollout.sampling import SamplingSettings
from vlmr1.settings import check_settings
from vlmr1_kernels import GRPOSettings

# Settings of `TrainingArguments` that have a better name here.
REPLACED = {
    "per_device_train_batch_size": "use prompts_per_device; passes are cut by tokens_per_pack",
    "gradient_accumulation_steps": "use prompts_per_device; passes are cut by tokens_per_pack",
    "auto_find_batch_size": "use tokens_per_pack",
    "eval_strategy": "use `vlmr1 evaluate` on a checkpoint, or eval_steps",
    "push_to_hub": "push the checkpoint directory with `hf upload`",
}
# Settings of `TrainingArguments` that mean here what they mean there; any other is refused, not ignored.
HONOURED = """
output_dir num_train_epochs max_steps seed data_seed full_determinism use_cpu bf16 tf32 resume_from_checkpoint
local_rank learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args use_liger_kernel
weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm
activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs
logging_strategy logging_steps logging_first_step logging_nan_inf_filter log_on_each_node log_level log_level_replica
disable_tqdm report_to run_name project skip_memory_metrics
save_strategy save_steps save_total_limit save_only_model ignore_data_skip remove_unused_columns
eval_steps eval_on_start
accelerator_config ddp_backend ddp_timeout ddp_bucket_cap_mb
dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order
""".split()  # noqa: SIM905


@dataclass
class GRPOConfig(TrainingArguments):
    """Settings of a GRPO run; names follow TRL where TRL has one, and everything else that
    `transformers.TrainingArguments` knows works as documented there, or is refused by name."""

    # Model and data
    model_name_or_path: str | None = field(default=None, metadata={"help": "local directory or hub id"})
    model_revision: str = field(default="main", metadata={"help": "revision of a hub model"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run code that a hub model ships"})
    attn_implementation: str = field(
        default="sdpa", metadata={"help": "attention of the vision tower and of unpacked passes"}
    )
    data_file_paths: list[str] = field(
        default_factory=list, metadata={"help": "JSON lines, JSON, parquet, data set folders or hub ids"}
    )
    image_folders: list[str] = field(
        default_factory=list,
        metadata={"help": "one for each data file, one for all, or none where rows hold their images"},
    )
    prompt_column: str = field(default="prompt", metadata={"help": "of rows in TRL's format"})
    solution_column: str = field(default="solution", metadata={"help": "of rows in TRL's format"})
    check_images: bool = field(default=True, metadata={"help": "decode every image before training"})
    val_split_ratio: float = field(default=0.0, metadata={"help": "share of the rows that are kept from training"})
    min_pixels: int | None = field(
        default=None, metadata={"help": "area to which smaller images are enlarged; models of patch grids"}
    )
    max_pixels: int | None = field(
        default=None, metadata={"help": "area to which larger images are reduced; models of patch grids"}
    )
    max_anyres_num: int | None = field(default=None, metadata={"help": "tiles of an image at most; InternVL"})
    question_template: str = field(
        default="rec", metadata={"help": f"{', '.join(TEMPLATES)}, or a text with {{question}} in it"}
    )

    # Evaluation during training, every eval_steps updates, and before the first with eval_on_start
    eval_data_file_paths: list[str] = field(default_factory=list, metadata={"help": "rows to evaluate on"})
    eval_image_folders: list[str] = field(default_factory=list, metadata={"help": "as image_folders"})
    eval_limit: int | None = field(default=None, metadata={"help": "evaluate on the first rows only"})

    # Rewards
    reward_funcs: list[str] = field(default_factory=lambda: ["accuracy", "format"])
    reward_weights: list[float] | None = field(default=None, metadata={"help": "one a reward; default 1 each"})
    scale_rewards: Literal["group", "batch", "none"] = "group"
    reward_mode: Literal["strict", "vlm_r1"] = field(
        default="strict", metadata={"help": "vlmr1 scores as the published code does, oddities included"}
    )
    box_coordinates: Literal["auto", "original", "resized", "thousand"] = field(
        default="auto",
        metadata={
            "help": "of a completion's boxes: pixels of the file, of the resized image, or thousandths; "
            "auto: by the model type; they are scored in pixels of the file"
        },
    )
    accu_reward_method: list[str] = field(
        default_factory=lambda: ["iou"],
        metadata={"help": "of the accuracy reward: one for all data files, or one for each; a row's own column wins"},
    )
    judge_url: str | None = field(default=None, metadata={"help": "OpenAI-compatible API of accu_reward_method llm"})
    judge_model: str | None = None
    judge_timeout: float = field(default=60.0, metadata={"help": "seconds a request"})
    judge_retries: int = 3
    judge_concurrency: int = 8
    overlong_cache_length: int | None = field(
        default=None, metadata={"help": "tokens of the `overlong` reward's slope"}
    )
    length_reward_max: int = field(default=1024, metadata={"help": "tokens from which the `length` reward is flat"})
    reward_workers: int = field(
        default=2, metadata={"help": "processes for rewards that may hang, started when needed; 0: none, no time limit"}
    )
    reward_timeout: float = field(default=10.0, metadata={"help": "seconds a completion, in those processes"})

    # Rollout
    prompts_per_device: int = field(default=8, metadata={"help": "prompts that each device works on in one update"})
    steps_per_generation: int = field(
        default=1, metadata={"help": "updates that share one generation, each with prompts_per_device of its prompts"}
    )
    num_iterations: int = field(default=1, metadata={"help": "times that updates go over the prompts of a generation"})
    num_generations: int = field(default=8, metadata={"help": "completions a prompt (G), at least 2"})
    dynamic_sampling: bool = field(
        default=False, metadata={"help": "groups whose rewards are all equal give way to groups of other prompts"}
    )
    dynamic_sampling_max_rounds: int = field(default=4, metadata={"help": "rounds after the first, at most"})
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "limit of a prompt in tokens, those of its images included; nothing is cut"}
    )
    overlong_prompts: Literal["error", "filter"] = field(
        default="error", metadata={"help": "a longer prompt stops the run, or its row is left out before it begins"}
    )
    max_completion_length: int = 256
    temperature: float = 1.0
    top_k: int = field(default=0, metadata={"help": "draw from the k most probable tokens; 0: from all"})
    top_p: float = field(default=1.0, metadata={"help": "draw from the most probable tokens of this mass"})
    min_p: float = field(default=0.0, metadata={"help": "draw from tokens of this share of the greatest probability"})
    repetition_penalty: float = field(default=1.0, metadata={"help": "of tokens in prompt and completion"})
    stop_strings: list[str] = field(default_factory=list, metadata={"help": "texts that end a completion"})
    rollout_kv_mib: float | None = field(
        default=None,
        metadata={"help": "budget of keys and values; default: what is needed, on a GPU up to half of what is free"},
    )
    cuda_graphs: bool | None = field(
        default=None, metadata={"help": "decode steps as CUDA graphs; default: on a GPU, with the native engine"}
    )
    rollout_logp_alarm: float = field(
        default=0.1, metadata={"help": "warn where engine and policy log-probs differ by more, mean a token in nats"}
    )
    rollout_engine: Literal["native", "transformers"] = field(
        default="native", metadata={"help": "native shares the prompt's KV; transformers calls `generate`"}
    )

    # Objective
    loss_type: Literal["grpo", "bnpo", "dapo", "dr_grpo", "cispo", "gspo"] = "grpo"
    importance_sampling_level: Literal["token", "sequence"] | None = field(
        default=None, metadata={"help": "of the ratio; default token, with gspo sequence"}
    )
    beta: float = field(default=0.04, metadata={"help": "weight of the KL to the reference; 0 loads none"})
    kl: Literal["k1", "k2", "k3"] = "k3"
    kl_in_reward: bool = field(
        default=False, metadata={"help": "the KL, summed over a completion, lowers its reward instead of being a loss"}
    )
    sync_ref_model: bool = field(default=False, metadata={"help": "the reference follows the policy"})
    ref_model_sync_steps: int = field(default=512, metadata={"help": "updates from one time to the next"})
    ref_model_mixup_alpha: float = field(
        default=0.6, metadata={"help": "reference = alpha * policy + (1 - alpha) * reference"}
    )
    epsilon: float = 0.2
    epsilon_high: float | None = field(default=None, metadata={"help": "upper clip; default epsilon"})
    delta: float | None = field(default=None, metadata={"help": "two-sided clip: cap of the unclipped ratio, above 1"})
    entropy_coef: float = field(default=0.0, metadata={"help": "weight of the entropy bonus in the loss"})
    mask_truncated_completions: bool = field(
        default=False, metadata={"help": "completions that met the length limit leave the loss"}
    )
    old_logprobs: Literal["rollout", "recompute"] = field(
        default="rollout",
        metadata={"help": "of the ratio: the rollout engine's, or of a forward of the policy before its first update"},
    )
    importance_sampling_correction: Literal[
        "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
    ] = field(default="none", metadata={"help": "weight of the loss: policy over rollout engine, bounded by the cap"})
    importance_sampling_cap: float = field(default=3.0, metadata={"help": "above it a weight is cut, or masked: 0"})
    max_nonfinite: int = field(
        default=5, metadata={"help": "stop after this many updates in a row that were not finite"}
    )

    # What is shared; all off is the naive trainer
    share_vision: bool = field(default=True, metadata={"help": "encode an image once a group, not G times"})
    share_prompt: bool = field(default=True, metadata={"help": "compute a prompt once a group, not G times"})
    pack: bool = field(default=True, metadata={"help": "several groups in one row, without padding"})
    tokens_per_pack: int = field(default=16384, metadata={"help": "budget of one packed row"})
    skip_zero_advantage: bool | None = field(
        default=None,
        metadata={"help": "completions of advantage 0 leave the policy pass; default: where they have no gradient"},
    )
    kernels: str = field(default="", metadata={"help": "op=impl,... ; see `vlmr1 doctor`"})

    # Parameters and precision
    freeze_vision: bool = field(default=False, metadata={"help": "train the decoder only"})
    freeze_merger: bool | None = field(
        default=None, metadata={"help": "the projector behind the vision tower is frozen; default: as freeze_vision"}
    )
    model_dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "dtype of the weights; with bf16, float32 weights are masters"}
    )
    stochastic_rounding: bool = field(
        default=False, metadata={"help": "of bfloat16 weights after an update, with optim adamw_torch_8bit"}
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={"help": "the decoder's linear layers in 4 bits (nf4), with use_peft"},
    )
    use_peft: bool = field(default=False, metadata={"help": "train a LoRA adapter; everything else is frozen"})
    lora_r: int = 64
    lora_alpha: int = 128
    lora_dropout: float = field(default=0.0, metadata={"help": "above 0 without share_prompt and pack only"})
    lora_target_modules: list[str] = field(
        default_factory=list, metadata={"help": "names of linear layers; default: all of the decoder"}
    )
    lora_vision: bool = field(default=False, metadata={"help": "adapters in the vision tower and projector too"})
    lora_modules_to_save: list[str] = field(
        default_factory=list, metadata={"help": "modules that are trained whole beside the adapter"}
    )
    use_rslora: bool = field(default=False, metadata={"help": "scale by alpha / sqrt(r), not alpha / r"})
    use_dora: bool = field(default=False, metadata={"help": "adapters of direction, and a trained magnitude"})
    lora_merge_rollout: bool = field(
        default=False,
        metadata={"help": "the adapter is merged for the rollout; costs a copy of its layers' weights"},
    )
    reference: Literal["auto", "copy", "adapter", "offload"] = field(
        default="auto",
        metadata={"help": "a copy, the adapter switched off, or a copy in host memory; auto: adapter, or copy"},
    )
    activation_offload: bool = field(
        default=False, metadata={"help": "what gradient_checkpointing keeps is held in host memory"}
    )

    # Defaults that differ from TrainingArguments
    output_dir: str | None = field(default="output")
    learning_rate: float = 1e-6
    lr_scheduler_type: str = "constant"
    logging_steps: float = 1
    save_steps: float = 100
    remove_unused_columns: bool | None = False
    log_completions: int = field(default=4, metadata={"help": "completions a step written to completions.jsonl"})
    memory_by_phase: bool = field(
        default=True, metadata={"help": "peak memory of each phase; starts the process's high-water marks anew"}
    )
    write_report: bool = field(default=True, metadata={"help": "training.html in output_dir when the run ends"})

    def __post_init__(self):
        for inherited in fields(TrainingArguments):
            if inherited.name not in HONOURED and _changed(inherited, getattr(self, inherited.name)):
                reason = REPLACED.get(inherited.name, "it has no effect on GRPO, or is not supported yet")
                raise SettingError(f"{inherited.name} cannot be set: {reason}")
        try:
            super().__post_init__()
            self.objective()
        except (ValueError, ImportError) as error:
            raise SettingError(str(error)) from error
        check_settings(self)
        check_parameters(self)
        self.per_device_train_batch_size = self.prompts_per_device  # what the loader reads
        self.ddp_find_unused_parameters = False  # every pass uses every parameter
        self.ddp_broadcast_buffers = False  # they are constants
        if self.n_gpu > 1:
            self._n_gpu = 1  # one process drives one device

    def objective(self) -> GRPOSettings:
        """The objective that these settings ask for; SettingError where one is out of range."""
        return kernel_settings(self)

    def rewards(self) -> RewardSettings:
        """What the rewards of a run are asked for; SettingError where a setting is out of range."""
        judge = None
        if self.judge_url is not None:
            judge = Judge(
                self.judge_url,
                self.judge_model or "",
                timeout=self.judge_timeout,
                retries=self.judge_retries,
                concurrency=self.judge_concurrency,
            )
        elif self.judge_model is not None:
            raise SettingError("judge_model needs judge_url")
        return RewardSettings(
            mode=self.reward_mode,
            accu_reward_method=self.accu_reward_method[0],
            judge=judge,
            max_completion_length=self.max_completion_length,
            overlong_cache_length=self.overlong_cache_length,
            length_reward_max=self.length_reward_max,
        )

    def sampling(self) -> SamplingSettings:
        """How the rollouts of a run draw."""
        return SamplingSettings(
            self.max_completion_length,
            self.temperature,
            seed=self.seed,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            stop=tuple(self.stop_strings),
        )

    @property
    def loss_beta(self) -> float:
        """Weight of the KL in the loss: none where it is in the reward."""
        return 0.0 if self.kl_in_reward else self.beta

    @property
    def skips_zero_advantage(self) -> bool:
        """`skip_zero_advantage`, or its default: whether the advantage is a completion's only source of gradient."""
        only = self.loss_beta == 0 and self.entropy_coef == 0
        return only if self.skip_zero_advantage is None else self.skip_zero_advantage


def _changed(setting: Field, value: object) -> bool:
    """Whether a setting was given another value than its default; empty ones are all the same."""
    default = None if setting.default is MISSING else setting.default
    one, other = (str(getattr(each, "value", each) or "no") for each in (value, default))
    return one != other and {one, other} - {"no", "False", "None", "{}", "[]"} != set()
