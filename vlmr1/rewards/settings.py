"""What the rewards of a run are asked for; made from the settings of the run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from vlmr1.data.box_coordinates import BoxCoordinates
from vlmr1.errors import SettingError
from vlmr1.rewards.judge import Judge
from vlmr1.rewards.length import COSINE_MAX

if TYPE_CHECKING:
    from vlmr1.data.box_coordinates import Setting

Mode = Literal["strict", "vlm_r1"]
MODES = ("strict", "vlm_r1")
DEFAULT_METHOD = "iou"
AS_THEY_STAND = BoxCoordinates()


@dataclass(frozen=True)
class RewardSettings:
    """Settings that all rewards share.

    `accu_reward_method` is of rows without a column of that name; `overlong_cache_length` and
    `max_completion_length` are the L_cache and L_max of `overlong`; `length_reward_max` the tokens from which `length`
    is flat; `boxes` what coordinates completions have. Raises SettingError for a value out of range.
    """

    mode: Mode = "strict"
    accu_reward_method: str = DEFAULT_METHOD
    judge: Judge | None = None
    max_completion_length: int | None = None
    overlong_cache_length: int | None = None
    length_reward_max: int = COSINE_MAX
    boxes: BoxCoordinates = AS_THEY_STAND

    def __post_init__(self) -> None:
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
