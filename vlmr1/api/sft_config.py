"""TRL's SFTConfig: its names, types, defaults and arithmetic on the settings of `vlmr1.config.SFTConfig`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from vlmr1.api.config import ELSEWHERE, KEPT, LOADING
from vlmr1.api.refused import NO_EXPERTS, refused_hub
from vlmr1.api.script import ScriptSettings, taken, without
from vlmr1.config import SFTConfig as CoreConfig
from vlmr1.errors import SettingError
from vlmr1.evaluation.settings import EvaluationSettings

NO_PACKING = (
    "rows are packed whatever it says, by tokens_per_pack, and an update has per_device_train_batch_size x "
    "gradient_accumulation_steps of them: leave it out"
)
# Settings, by the reason for which another value than the default is refused.
REASONS = {
    "activation_offloading": "use gradient_checkpointing and activation_offload",
    "chat_template_path": "set processing_class.chat_template",
    "completion_only_loss": "only answers are trained on, never the tokens of a prompt",
    "dataset_text_field": "a row is a prompt with an answer, or messages: a column of plain text is not trained on",
    "deepspeed": "start the script with `accelerate launch` and its DeepSpeed configuration",
    "eos_token": "an answer ends as the chat template ends a turn: set processing_class.chat_template",
    "eval_packing": NO_PACKING,
    "fp16": "use bf16: float16 overflows without a scaled loss",
    "fsdp": "start the script with `accelerate launch` and its FSDP configuration",
    "loss_type": "the loss is the negative log-likelihood, nll",
    "packing": NO_PACKING,
    "pad_token": "set processing_class.tokenizer.pad_token",
    "router_aux_loss_coef": NO_EXPERTS,
    "truncation_mode": "images stand at the beginning: longer answers are cut at their end",
}
ALLOWED = {"completion_only_loss": (None, True), "loss_type": ("nll", "chunked_nll"), "eval_packing": (None, False)}

Base = CoreConfig if TYPE_CHECKING else without(CoreConfig, ELSEWHERE, __name__)


@dataclass
class SFTConfig(ScriptSettings, Base):
    """Settings of supervised fine-tuning with the names, defaults and units of TRL. A setting that cannot be honoured
    is an error that names it. Settings of vlmr1 that TRL has not may be given too."""

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*CoreConfig._VALID_DICT_FIELDS, "model_init_kwargs", "dataset_kwargs"]
    also_supported = frozenset(KEPT)
    not_checked = (EvaluationSettings,)
    in_dicts: ClassVar[dict[str, dict[str, str]]] = {"model_init_kwargs": LOADING}
    beta = 0.0  # no reference model

    # TRL's defaults
    output_dir: str | None = "trainer_output"
    max_length: int | None = 1024
    shuffle_dataset: bool = False
    logging_steps: float = 10
    save_steps: float = 500
    gradient_checkpointing: bool = True
    remove_unused_columns: bool | None = True
    bf16: bool | None = None  # type: ignore[assignment]
    model_init_kwargs: dict | str | None = None
    assistant_only_loss: bool = False
    disable_dropout: bool = False
    # Without effect here
    dataset_kwargs: dict | str | None = taken(None)  # noqa: RUF009
    dataset_num_proc: int | None = taken(None)
    packing_strategy: str = taken("bfd")
    padding_free: bool = taken(False)
    pad_to_multiple_of: int | str | None = taken("auto")
    # Refused unless they have these values, or those of `ALLOWED`
    activation_offloading: bool = taken(False)
    chat_template_path: str | None = taken(None)
    completion_only_loss: bool | None = taken(None)
    dataset_text_field: str = taken("text")
    eos_token: str | None = taken(None)
    eval_packing: bool | None = taken(None)
    loss_type: str = taken("nll")
    packing: bool = taken(False)
    pad_token: str | None = taken(None)
    router_aux_loss_coef: float | None = taken(None)
    truncation_mode: str = taken("keep_start")

    def __post_init__(self) -> None:
        self.reads_dtype = False  # whether the weights have the dtype of the checkpoint
        self.quantization: Any = None  # of model_init_kwargs
        if self.bf16 is None:  # on, but for machines without a GPU, where the library refuses it without use_cpu
            self.bf16 = not self.fp16 and (self.use_cpu or torch.cuda.is_available())
        faults = [*_refused(self), *refused_hub(self), *self._batches(), *self.read_kwargs(), *self._evaluation()]
        # The trainer's loop must not group updates: an update is one step of it.
        self.accumulation, self.gradient_accumulation_steps = self.gradient_accumulation_steps, 1
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "loss"
        known: dict[str, Any] = {"shuffle_dataset": True}  # TRL's trainer draws rows at random in any case
        if self.model_dtype == "bfloat16":
            known["use_peft"] = True  # or the trainer refuses it, which knows whether an adapter is trained
        if not self.push_to_hub:
            known |= {"hub_model_id": None, "hub_private_repo": None, "hub_revision": None}
        known["per_device_train_batch_size"] = self.per_device_train_batch_size
        asked = {name: getattr(self, name) for name in known if name != "shuffle_dataset"}
        for name, value in known.items():
            setattr(self, name, value)
        try:
            super().__post_init__()
        except SettingError as error:
            named = {fault.split()[0] for fault in faults}
            faults += [line for line in str(error).splitlines() if line.split()[0] not in named]
        for name, value in asked.items():
            setattr(self, name, value)
        if faults:
            raise SettingError("\n".join(dict.fromkeys(faults)))

    def _batches(self) -> Iterator[str]:
        """Set `prompts_per_device` by TRL's numbers; yield what is wrong with them."""
        size, passes = self.per_device_train_batch_size, self.gradient_accumulation_steps
        if not all(isinstance(each, int) and each >= 1 for each in (size, passes)):
            yield "per_device_train_batch_size and gradient_accumulation_steps must be at least 1"
        else:
            self.prompts_per_device = size * passes


def _refused(config: SFTConfig) -> Iterator[str]:
    """Yield the settings that cannot be honoured."""
    for name, reason in REASONS.items():
        value, default = getattr(config, name), SFTConfig.__dataclass_fields__[name].default
        if value not in ALLOWED.get(name, (default, default or None, [])):
            yield f"{name} is {value!r}: {reason}"
