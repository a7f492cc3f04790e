"""RunConfig: the settings that every run has, whatever its loss, and how settings of all packages are checked."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar, TypeVar
from warnings import catch_warnings, filterwarnings

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy

from vlmr1.data.settings import DataSettings
from vlmr1.errors import SettingError, faults_of
from vlmr1.lifecycle.peer_flags import PEER_FLAGS, from_peers
from vlmr1.lifecycle.renamed import RENAMED, current
from vlmr1.models.settings import ParameterSettings
from vlmr1.training.settings import TrainerSettings
from vlmr1.types import Settings, setting

# Settings of `TrainingArguments` that have a better name here.
RENAMED_ARGS = {
    "auto_find_batch_size": "use tokens_per_pack",
    "deepspeed": "use `vlmr1 {command} --launch zero2 | zero3 | zero3-offload`, or --deepspeed FILE on its command "
    "line",
    "eval_strategy": "use `vlmr1 evaluate` on a checkpoint, or eval_steps",
    "fp16": "use bf16; float16 overflows without a scaled loss",
    "fsdp": "use `vlmr1 {command} --launch fsdp2`",
    "torch_compile": "packs differ in shape and would be compiled again and again; use `kernels`, or fused_layers",
    "hub_token": "set the variable HF_TOKEN or use `hf auth login`: settings are written to checkpoints",
    "hub_strategy": "the model is pushed once, when the run has finished",
}
# Settings of `TrainingArguments` that mean here what they mean there, by group; any other is refused, not ignored.
SUPPORTED_ARGS = {
    "Run": [
        "output_dir",
        "num_train_epochs",
        "max_steps",
        "seed",
        "data_seed",
        "full_determinism",
        "use_cpu",
        "bf16",
        "tf32",
        "resume_from_checkpoint",
    ],
    "Optimizer": [
        "learning_rate",
        "lr_scheduler_type",
        "lr_scheduler_kwargs",
        "warmup_steps",
        "optim",
        "optim_args",
        "weight_decay",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "max_grad_norm",
    ],
    "Memory": [
        "activation_checkpointing",
        "activation_checkpointing_kwargs",
        "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
        "use_liger_kernel",
    ],
    "Logs": [
        "logging_strategy",
        "logging_steps",
        "logging_first_step",
        "logging_nan_inf_filter",
        "log_on_each_node",
        "log_level",
        "log_level_replica",
        "disable_tqdm",
        "report_to",
        "run_name",
        "project",
        "skip_memory_metrics",
    ],
    "Checkpoints": ["save_strategy", "save_steps", "save_total_limit", "save_only_model", "ignore_data_skip"],
    "Hub": ["push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision"],
    "Evaluation during training": [
        "eval_steps",
        "eval_on_start",
        "load_best_model_at_end",
        "metric_for_best_model",
        "greater_is_better",
    ],
    "Processes": ["accelerator_config", "ddp_backend", "ddp_timeout", "ddp_bucket_cap_mb", "local_rank"],
    "Data loader": [
        "dataloader_drop_last",
        "dataloader_num_workers",
        "dataloader_pin_memory",
        "dataloader_persistent_workers",
        "dataloader_prefetch_factor",
        "dataloader_multiprocessing_context",
        "dataloader_in_order",
        "remove_unused_columns",
    ],
}
T = TypeVar("T", bound=type)


def with_old_names(cls: T) -> T:
    """The class, whose constructor also takes the old names of settings, and settings of other trainers."""
    construct: Callable[..., None] = cls.__init__

    @wraps(construct)
    def init(self: Any, *args: Any, **given: Any) -> None:
        settings, faults = from_peers(current(given), cls.sequences_of_prompt)
        refuse([*faults, *faults_of(lambda: construct(self, *args, **settings))])

    cls.__init__ = init
    return cls


@dataclass
class RunConfig(TrainerSettings, DataSettings, ParameterSettings, TrainingArguments):
    """Settings that every run has. The configuration of a trainer is a subclass, first among its bases, that adds the
    settings of further packages. A setting of `transformers.TrainingArguments` works as documented there, or is
    refused by name."""

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*TrainingArguments._VALID_DICT_FIELDS, "chat_template_kwargs"]
    # Of a subclass: settings of TrainingArguments that it honours too, and settings that it checks itself.
    also_supported: ClassVar[frozenset[str]] = frozenset()
    not_checked: ClassVar[tuple[type[Settings], ...]] = ()
    # Of a trainer: its command, its method, the suffix of its recipes, the default of metric_for_best_model, settings
    # of other trainers that it reads, and the completions of a prompt where no setting says so.
    command: ClassVar[str]
    method: ClassVar[str]
    recipe_suffix: ClassVar[str] = ""
    best_metric: ClassVar[str]
    peer_flags: ClassVar[dict[str, type]] = PEER_FLAGS
    sequences_of_prompt: ClassVar[int] = 1

    # Defaults that differ from TrainingArguments
    output_dir: str | None = setting("output", "directory of checkpoints, logs and report")
    learning_rate: float = 1e-6
    lr_scheduler_type: str = "constant"
    logging_steps: float = 1
    save_steps: float = 100
    remove_unused_columns: bool | None = False

    # Settings that the constructor was given; from a parser that gives all of them, those that are no defaults.
    given: ClassVar[frozenset[str]] = frozenset()

    def __new__(cls, *args: Any, **given: Any) -> Any:
        made = super().__new__(cls)
        defaults = {each.name: each.default for each in fields(cls) if each.init}
        every = defaults.keys() <= given.keys()
        named = (name for name, value in given.items() if not every or value != defaults.get(name))
        made.given = frozenset(named)  # type: ignore[misc]
        return made

    def __post_init__(self):
        faults = list(_unsupported(self))
        if not faults:
            faults += faults_of(self._as_training_arguments)
        works = not faults  # as TrainingArguments: its values have their types
        for part in self.parts():
            wrong = list(part.wrong_types(self))
            works = works and not wrong
            faults += wrong or ([] if part in self.not_checked else part.check(self))
        if works:
            faults += self.check()
        refuse(faults or list(self.late_faults()))
        self.per_device_train_batch_size: int = self.prompts_per_device  # what the loader reads
        self.ddp_find_unused_parameters = False  # every pass uses every parameter
        self.ddp_broadcast_buffers = False  # they are constants
        if self.n_gpu > 1:
            self._n_gpu = 1  # one process drives one device

    def _as_training_arguments(self) -> None:
        """Check and convert as TrainingArguments does. It would compare `eval_strategy` for the best model."""
        best, self.load_best_model_at_end = self.load_best_model_at_end, False
        if (best or self.save_strategy == SaveStrategy.BEST) and self.metric_for_best_model is None:
            self.metric_for_best_model = self.best_metric
        with catch_warnings():  # of gradient_checkpointing, the only name in some versions, and TRL's
            filterwarnings("ignore", "`gradient_checkpointing", FutureWarning)
            TrainingArguments.__post_init__(self)
        self.load_best_model_at_end = best

    def _validate_args(self) -> None:
        """As the library, which knows bfloat16 on a CPU only with `use_cpu`; DeepSpeed is used on one without."""
        before = self.use_cpu
        self.use_cpu = before or os.environ.get("DS_ACCELERATOR") == "cpu"
        try:
            super()._validate_args()
        finally:
            self.use_cpu = before

    def __getattr__(self, name: str) -> Any:
        if name in RENAMED:
            return getattr(self, RENAMED[name])
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def check(self) -> Iterator[str]:
        """Yield the faults of settings of two packages, and of those of TrainingArguments."""
        if self.max_steps < -1:
            yield f"max_steps is {self.max_steps}: it must not be negative; -1 leaves it to num_train_epochs"
        if self.num_train_epochs < 0:
            yield f"num_train_epochs is {self.num_train_epochs}: it must not be negative"
        if isinstance(self.chat_template_kwargs, str):  # TrainingArguments reads JSON
            yield f"chat_template_kwargs is {self.chat_template_kwargs!r}: it must be a JSON object"
        if self.streaming and self.max_steps <= 0:
            yield "streaming=true needs max_steps: the number of rows is not known, and so not that of an epoch"
        for name in ("model_name_or_path", "adapter"):
            if _is_folder(getattr(self, name), self.output_dir):
                yield f"output_dir is the directory of {name}, whose files the new model would replace: give another"

    def late_faults(self) -> Iterator[str]:
        """Yield faults that are looked for where there is no other."""
        return iter(())

    def check_device(self, device: str | None = None) -> None:  # type: ignore[override]
        """SettingError for what this machine cannot do: the preflight of a run, which a plan leaves out."""
        refuse(self.device_faults(device))

    def device_faults(self, device: str | None = None) -> list[str]:
        """Return what this machine cannot do, also of settings that are refused otherwise."""
        if device is None:
            device = "cpu" if self.use_cpu or not torch.cuda.is_available() else "cuda"
        return [fault for part in self.parts() for fault in part.check_device(self, device)]

    @classmethod
    def parts(cls) -> list[type[Settings]]:
        """The classes that declare settings of this configuration, in the order of its help."""
        found = (each for each in reversed(cls.__mro__) if issubclass(each, Settings))
        return [each for each in found if "group" in vars(each)]

    @classmethod
    def groups(cls) -> dict[str, list[str]]:
        """The names of the settings that a run may have, by group."""
        found: dict[str, list[str]] = {}
        for part in cls.parts():
            found.setdefault(part.group, []).extend(vars(part)["__annotations__"])
        for group, names in SUPPORTED_ARGS.items():
            found.setdefault(group, []).extend(names)
        return found


def _unsupported(config: RunConfig) -> Iterator[str]:
    supported = {name for names in SUPPORTED_ARGS.values() for name in names} | config.also_supported
    for inherited in fields(TrainingArguments):
        if inherited.name not in supported and _changed(inherited, getattr(config, inherited.name)):
            default = f"it has no effect on {config.method}, or is not supported yet"
            reason = RENAMED_ARGS.get(inherited.name, default).format(command=config.command)
            yield f"{inherited.name} cannot be set: {reason}"


def _is_folder(name: str | None, folder: str | None) -> bool:
    """Return whether a name is of this existing directory."""
    if name is None or folder is None or not Path(name).is_dir():
        return False
    return Path(name).resolve() == Path(folder).resolve()


def _changed(setting: Field, value: object) -> bool:
    """Return whether a setting was given another value than its default; empty ones are all the same."""
    default = None if setting.default is MISSING else setting.default
    one, other = (str(getattr(each, "value", each) or "no") for each in (value, default))
    return one != other and {one, other} - {"no", "False", "None", "{}", "[]"} != set()


def refuse(faults: list[str]) -> None:
    """SettingError that has all faults, a line each."""
    if faults:
        raise SettingError("\n".join(dict.fromkeys(faults)))
