"""Configurations of the trainers: the settings of all packages in one flat command line, and checks between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from transformers import TrainingArguments

from vlmr1.data.settings import DataSettings
from vlmr1.errors import faults_of
from vlmr1.evaluation.settings import EvaluationSettings
from vlmr1.grpo.settings import BatchSettings, ObjectiveSettings
from vlmr1.models.settings import ParameterSettings
from vlmr1.report.settings import CompletionLogSettings, ReportSettings
from vlmr1.rewards.settings import RewardOptions
from vlmr1.rollout.settings import RolloutSettings
from vlmr1.sft.settings import QUESTION_TEMPLATE, AnswerSettings
from vlmr1.training.run_config import RunConfig, with_old_names
from vlmr1.training.settings import TrainerSettings


@with_old_names
@dataclass
class GRPOConfig(
    RunConfig,
    CompletionLogSettings,  # dataclass fields, and the help, come in the reverse order of the bases from here on
    ReportSettings,
    EvaluationSettings,
    TrainerSettings,
    BatchSettings,
    ObjectiveSettings,
    RolloutSettings,
    RewardOptions,
    DataSettings,
    ParameterSettings,
    TrainingArguments,
):
    """Settings of a GRPO run; names follow TRL where TRL has one."""

    command: ClassVar[str] = "train"
    method: ClassVar[str] = "GRPO"
    sequences_of_prompt: ClassVar[int] = 8

    def check(self) -> Iterator[str]:
        if self.reference == "adapter" and not self.use_peft:
            yield "reference=adapter needs use_peft: it is the policy with its adapter switched off"
        if self.sync_ref_model and self.reference_kind == "adapter":
            yield (
                "sync_ref_model needs reference=copy or offload: with LoRA the reference is the frozen base model, "
                "which cannot be updated"
            )
        yield from super().check()
        if self.streaming and self.dynamic_sampling:
            yield "dynamic_sampling draws from all rows, and streaming=true knows none before: leave one of them out"
        for name, value in (("ignore_data_skip", False), ("dataloader_in_order", True)):
            if self.updates_per_generation * self.num_iterations > 1 and getattr(self, name) != value:
                yield (
                    f"{name}={not value} cannot be used where a generation serves several updates "
                    "(steps_per_generation, num_iterations): prompts and updates would not meet"
                )

    def late_faults(self) -> Iterator[str]:
        yield from faults_of(self.objective)


@with_old_names
@dataclass
class SFTConfig(
    RunConfig,
    ReportSettings,
    EvaluationSettings,
    TrainerSettings,
    AnswerSettings,
    DataSettings,
    ParameterSettings,
    TrainingArguments,
):
    """Settings of supervised fine-tuning; names follow TRL where TRL has one."""

    command: ClassVar[str] = "sft"
    method: ClassVar[str] = "supervised fine-tuning"
    recipe_suffix: ClassVar[str] = "-sft"
    best_metric = "loss"
    has_box_metrics = False
    evaluation_metrics = property(lambda self: ("loss", "mean_token_accuracy", "entropy"))
    peer_flags: ClassVar[dict[str, type]] = {"dataset_name": str, "lora_task_type": str}

    # Defaults of TRL, and the turn of a row as it stands
    learning_rate: float = 2e-5
    lr_scheduler_type: str = "linear"
    question_template: str = QUESTION_TEMPLATE
