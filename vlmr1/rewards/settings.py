"""Settings of rewards: those of a run, and what all its reward functions share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from vlmr1.data.box_coordinates import BoxCoordinates
from vlmr1.errors import SettingError, faults_of
from vlmr1.lifecycle.renamed import current_value
from vlmr1.rewards.judge import Judge, judge_of
from vlmr1.rewards.length import COSINE_MAX
from vlmr1.types import Settings, setting

if TYPE_CHECKING:
    from vlmr1.data.box_coordinates import Setting

Mode = Literal["strict", "vlm_r1"]
MODES = ("strict", "vlm_r1")
DEFAULT_METHOD = "iou"
DEFAULT_REWARDS = ["accuracy", "format"]
AS_THEY_STAND = BoxCoordinates()


@dataclass(frozen=True)
class RewardSettings:
    """Settings that all rewards share.

    `accu_reward_method` is of rows without a column of that name; `overlong_cache_length` and
    `max_completion_length` are the L_cache and L_max of `overlong`; `length_reward_max` the tokens from which `length`
    is flat; `boxes` what coordinates completions have; `allow_empty_think` is of `format`. Raises SettingError for a
    value out of range.
    """

    mode: Mode = "strict"
    accu_reward_method: str = DEFAULT_METHOD
    judge: Judge | None = None
    max_completion_length: int | None = None
    overlong_cache_length: int | None = None
    length_reward_max: int = COSINE_MAX
    boxes: BoxCoordinates = AS_THEY_STAND
    allow_empty_think: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "mode", current_value("reward_mode", self.mode))
        if self.mode not in MODES:
            raise SettingError(f"reward_mode is {self.mode!r}: one of {', '.join(MODES)}")
        if self.length_reward_max < 1:
            raise SettingError(f"length_reward_max is {self.length_reward_max}: it must be at least 1")
        if self.mode == "vlm_r1" and self.length_reward_max != COSINE_MAX:
            raise SettingError(
                f"length_reward_max is {COSINE_MAX} with reward_mode vlm_r1, not {self.length_reward_max}"
            )
        if self.mode == "vlm_r1" and self.boxes != AS_THEY_STAND:
            raise SettingError(
                f"boxes are {self.boxes.space} with reward_mode vlm_r1: the published code converts its own"
            )
        if self.mode == "vlm_r1" and self.allow_empty_think:
            raise SettingError(
                "allow_empty_think is true with reward_mode vlm_r1, whose code counts empty blocks anyway: leave it out"
            )
        cache, longest = self.overlong_cache_length, self.max_completion_length
        if cache is not None and (longest is None or not 1 <= cache < longest):
            raise SettingError(
                f"overlong_cache_length is {cache}: it must be at least 1 and below max_completion_length, {longest}"
            )

    def with_boxes(self, setting: Setting, model_type: str, image_processor: Any) -> RewardSettings:
        """With the coordinates that the setting box_coordinates says for a model; the published code converts its own.

        SettingError where the model cannot have them."""
        if self.mode == "vlm_r1":
            return self
        return replace(self, boxes=BoxCoordinates.of(setting, model_type, image_processor))


DEFAULTS = RewardSettings()


class _Shared(Settings):
    shared = ("max_completion_length",)
    if TYPE_CHECKING:
        max_completion_length: int


@dataclass
class RewardOptions(_Shared):
    """The reward functions of a run and their options."""

    group = "Rewards"

    reward_funcs: list[str] = setting(DEFAULT_REWARDS, "names of reward functions")
    reward_weights: list[float] | None = setting(None, "one for each reward; default: 1 each")
    reward_mode: Literal["strict", "vlm_r1"] = setting(
        "strict", "vlm_r1 scores as VLM-R1's published code does, its faults included"
    )
    box_coordinates: Literal["auto", "original", "resized", "thousand"] = setting(
        "auto",
        "units of the boxes in completions: pixels of the file, pixels of the resized image, or thousandths; auto: by "
        "the model type. Boxes are scored in pixels of the file",
    )
    allow_empty_think: bool = setting(
        False, "the rewards `format` and `format_rec_*` count a completion whose `<think>` block is empty"
    )
    accu_reward_method: list[str] = setting(
        [DEFAULT_METHOD], "method of the accuracy reward: one for all data files, or one for each; a row's column wins"
    )
    judge_url: str | None = setting(None, "OpenAI-compatible API of accu_reward_method llm")
    judge_model: str | None = setting(None, "model that judge_url serves")
    judge_timeout: float = setting(60.0, "seconds a request")
    judge_retries: int = setting(3, "further attempts after a request that failed")
    judge_concurrency: int = setting(8, "requests at the same time")
    overlong_cache_length: int | None = setting(None, "tokens over which the `overlong` reward falls")
    length_reward_max: int = setting(COSINE_MAX, "tokens from which the `length` reward is constant")
    reward_workers: int = setting(
        2, "processes for rewards that may hang, started when needed; 0: no processes and no time limit"
    )
    reward_timeout: float = setting(10.0, "seconds a completion, in those processes")

    def check(self) -> Iterator[str]:
        if self.reward_mode == "vlm_r1" and self.box_coordinates != "auto":
            yield (
                f"box_coordinates is {self.box_coordinates!r} with reward_mode vlm_r1, whose code converts boxes or "
                "not by the reward's name: leave it at auto"
            )
        self.accu_reward_method = [name for joint in self.accu_reward_method for name in joint.split(":")]
        if self.accu_reward_method:
            yield from faults_of(self.rewards)
        else:
            yield "accu_reward_method is empty: name one method, or one for each data file"
        if self.reward_weights is not None and len(self.reward_weights) != len(self.reward_funcs):
            yield f"reward_weights has {len(self.reward_weights)} values for {len(self.reward_funcs)} reward_funcs"
        yield from self.at_least(0, "reward_workers")
        yield from self.above_zero("reward_timeout")

    def rewards(self) -> RewardSettings:
        """Return the settings that the rewards of a run share; SettingError where a setting is out of range."""
        shared = ("max_completion_length", "overlong_cache_length", "length_reward_max", "allow_empty_think")
        return RewardSettings(
            mode=self.reward_mode,
            accu_reward_method=self.accu_reward_method[0],
            judge=judge_of(self),
            **{name: getattr(self, name) for name in shared},
        )
