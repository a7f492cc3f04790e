"""Options that determine the results of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from vlmr1.data.box_coordinates import Setting
from vlmr1.data.templates import question_text
from vlmr1.errors import SettingError
from vlmr1.rewards.judge import Judge
from vlmr1.rewards.settings import RewardSettings
from vlmr1.rollout import ENGINES
from vlmr1_kernels.registry import ImplementationError, parse_choices

Task = Literal["rec", "ovd", "vqa"]
TASKS = get_args(Task)
TEMPLATE_OF: dict[str, str] = {"rec": "rec", "ovd": "odLength", "vqa": "default"}
LENGTH_OF: dict[str, int] = {"rec": 256, "ovd": 1024, "vqa": 1024}  # tokens
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Options:
    """Options that change what is computed. SettingError for an invalid value."""

    task: Task
    data: tuple[str, ...]
    images: tuple[str, ...] = ()
    question_template: str = ""  # "": the task's default
    accu_reward_method: tuple[str, ...] = ()  # for vqa; empty: default
    judge: Judge | None = None
    max_completion_length: int = 0  # 0: the task's default
    batch_size: int = 32  # rows that are decoded together; it alone determines the batches
    limit: int | None = None
    box_coordinates: Setting = "auto"
    prompt_column: str = "prompt"
    solution_column: str = "solution"
    revision: str = "main"
    trust_remote_code: bool = False
    dtype: str = "float32"
    rollout_engine: str = "native"
    kernels: str = ""

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise SettingError(f"--task is {self.task!r}: one of {', '.join(TASKS)}")
        if not self.data:
            raise SettingError("--data is not set: name at least one data file")
        for name, least in (("batch_size", 1), ("limit", 1), ("max_completion_length", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise SettingError(f"--{name} is {value}: it must be at least 1")
        for name, known in (
            ("box_coordinates", get_args(Setting)),
            ("dtype", DTYPES),
            ("rollout_engine", tuple(ENGINES)),
        ):
            if getattr(self, name) not in known:
                raise SettingError(f"--{name} is {getattr(self, name)!r}: one of {', '.join(known)}")
        if self.task != "vqa" and (self.accu_reward_method or self.judge):
            name = "accu_reward_method" if self.accu_reward_method else "judge_url"
            raise SettingError(f"--{name} is for --task vqa; {self.task} has metrics of its own")
        try:
            parse_choices(self.kernels)
        except ImplementationError as error:
            raise SettingError(f"--kernels: {error}") from error
        question_text(self.template)

    @property
    def template(self) -> str:
        return self.question_template or TEMPLATE_OF[self.task]

    @property
    def tokens(self) -> int:
        """Maximum length of a completion."""
        return self.max_completion_length or LENGTH_OF[self.task]

    @property
    def methods(self) -> tuple[str, ...]:
        """Accuracy methods; several may be joined by ':', as in training."""
        return tuple(name for joint in self.accu_reward_method for name in joint.split(":")) or ("default",)

    def rewards(self) -> RewardSettings:
        """Settings of the accuracy reward of vqa."""
        return RewardSettings(accu_reward_method=self.methods[0], judge=self.judge)

    def written(self) -> dict[str, Any]:
        """All options by name, as they are written beside the results."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        values |= {
            "data": list(self.data),
            "images": list(self.images),
            "question_template": self.template,
            "accu_reward_method": list(self.methods) if self.task == "vqa" else None,
            "judge": self.judge and {"url": self.judge.url, "model": self.judge.model},
            "max_completion_length": self.tokens,
        }
        return values
