"""Options that determine the results of an evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, get_args, get_type_hints

from vlmr1.data.box_coordinates import Setting
from vlmr1.data.formats import Columns
from vlmr1.data.templates import AUTO, question_text
from vlmr1.errors import SettingError
from vlmr1.rewards.judge import Judge, judge_of
from vlmr1.rewards.question import auto_template
from vlmr1.rewards.settings import RewardSettings
from vlmr1.types import Settings, setting
from vlmr1_kernels.registry import ImplementationError, parse_choices

Task = Literal["rec", "ovd", "vqa"]
# The reward by which question_template auto chooses.
REWARD_OF: dict[str, str] = {"rec": "iou", "ovd": "odLength", "vqa": "accuracy"}
LENGTH_OF: dict[str, int] = {"rec": 256, "ovd": 1024, "vqa": 1024}  # tokens


def _by_task(values: dict) -> str:
    return "default: " + ", ".join(f"{task}: {value}" for task, value in values.items())


@dataclass(frozen=True)
class Options(Settings):
    """Options that change what is computed. SettingError for an invalid value."""

    task: Task = setting(MISSING, "one box; boxes with labels; answers in words")
    data: list[str] = setting(MISSING, "data files as in training, RefCOCO JSON, COCO annotation JSON")
    images: list[str] = setting([], "image folders: one for each data file, or one for all")
    question_template: str = setting(
        AUTO, "as in training; auto: by the task (rec, odLength), for vqa by the accuracy method"
    )
    accu_reward_method: list[str] = setting([], "of vqa: one, or one for each file; a row's column wins")
    judge_url: str | None = setting(None, "OpenAI-compatible API of accu_reward_method llm")
    judge_model: str | None = setting(None, "model that judge_url serves")
    judge_timeout: float = setting(60.0, "seconds a request")
    judge_retries: int = setting(3, "further attempts after a request that failed")
    judge_concurrency: int = setting(8, "requests at the same time")
    max_completion_length: int | None = setting(None, f"tokens; {_by_task(LENGTH_OF)}")
    batch_size: int = setting(32, "rows that are decoded together; it alone determines the batches")
    limit: int | None = setting(None, "evaluate the first rows only")
    box_coordinates: Setting = setting("auto", "in which the model writes boxes")
    prompt_column: str = setting("prompt", "as in training")
    solution_column: str = setting("solution", "as in training")
    image_column: str = setting("", "as in training")
    system_prompt: str | None = setting(None, "as in training")
    images_outside_folders: bool = setting(False, "as in training")
    revision: str = setting("main", "of a hub model")
    trust_remote_code: bool = setting(False, "run code that a hub model ships")
    dtype: Literal["float32", "bfloat16"] = setting("float32", "of weights and computation")
    rollout_engine: Literal["native", "transformers"] = setting("native", "as in training")
    kernels: str = setting("", "op=impl,... ; see `vlmr1 doctor`")

    def __post_init__(self) -> None:
        for fault in self.check():
            raise SettingError(f"--{fault}")
        if self.template != AUTO:
            question_text(self.template)
        judge_of(self)

    def check(self) -> Iterator[str]:
        if not self.data:
            yield "data is not set: name at least one data file"
        yield from self.at_least(1, "batch_size", "limit", "max_completion_length")
        hints = get_type_hints(Options)
        for name in ("task", "box_coordinates", "dtype", "rollout_engine"):
            if getattr(self, name) not in get_args(hints[name]):
                yield f"{name} is {getattr(self, name)!r}: one of {', '.join(get_args(hints[name]))}"
        if self.task != "vqa" and (self.accu_reward_method or self.judge_url):
            name = "accu_reward_method" if self.accu_reward_method else "judge_url"
            yield f"{name} is for --task vqa; {self.task} has metrics of its own"
        try:
            parse_choices(self.kernels)
        except ImplementationError as error:
            yield f"kernels: {error}"

    @property
    def template(self) -> str:
        """The name or text of the template; auto for vqa, where it is by the method of the row."""
        if self.question_template != AUTO or self.task == "vqa":
            return self.question_template
        return auto_template([REWARD_OF[self.task]], self.methods[0])

    @property
    def columns(self) -> Columns:
        names = self.prompt_column, self.solution_column, self.image_column
        return Columns(*names, self.system_prompt, self.images_outside_folders)

    @property
    def tokens(self) -> int:
        """Maximum length of a completion."""
        return self.max_completion_length or LENGTH_OF[self.task]

    @property
    def methods(self) -> tuple[str, ...]:
        """Accuracy methods; several may be joined by ':', as in training."""
        return tuple(name for joint in self.accu_reward_method for name in joint.split(":")) or ("default",)

    @property
    def judge(self) -> Judge | None:
        return judge_of(self)

    def rewards(self) -> RewardSettings:
        """Settings of the accuracy reward of vqa."""
        return RewardSettings(accu_reward_method=self.methods[0], judge=self.judge)

    def written(self) -> dict[str, Any]:
        """All options by name, as they are written beside the results."""
        names = [each.name.replace("judge_url", "judge") for each in fields(self)]
        values = {name: getattr(self, name) for name in names if not name.startswith("judge_")}
        values |= {
            "data": list(self.data),
            "images": list(self.images),
            "question_template": self.template,
            "accu_reward_method": list(self.methods) if self.task == "vqa" else None,
            "judge": self.judge and {"url": self.judge.url, "model": self.judge.model},
            "max_completion_length": self.tokens,
        }
        return values
