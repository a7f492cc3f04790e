"""The accuracy method of a row: its own column, else the setting; and which methods read boxes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vlmr1.errors import SettingError

if TYPE_CHECKING:
    from vlmr1.rewards.settings import RewardSettings
    from vlmr1.types import Sample

METHOD = "accu_reward_method"  # setting, and column of a row
CONVERTED = ("iou", "map", "od_ap", "od_ap50", "odLength", "weighted_sum", "point_in_box")  # methods of accuracy
WRITTEN_BOXES = ("iou_qwen", "iou_internvl", "iou_glm")  # methods with VLM-R1's own conversions, or none
BOX_REWARDS = ("iou", "point_in_box")
METHOD_REWARDS = ("accuracy", "length")  # rewards that read an answer as the row's method does


def method_of(sample: Sample, settings: RewardSettings) -> str:
    """Return the row's own method, or that of the settings."""
    return sample.columns.get(METHOD) or settings.accu_reward_method


def converts(reward: str, method: str) -> bool:
    """Return whether a strict reward with this method reads boxes or points, converted to pixels of the file."""
    return reward in BOX_REWARDS or (reward in METHOD_REWARDS and method in CONVERTED)


def columns_of_files(count: int, methods: Sequence[str]) -> list[dict[str, Any]]:
    """Return for each of `count` data files the method of its rows without a column of their own, as a column.

    One method is the setting of all rows: the list is empty. SettingError for another number of methods than files.
    """
    if len(methods) == 1:
        return []
    if len(methods) != count:
        raise SettingError(
            f"accu_reward_method has {len(methods)} methods for {count} data files: give one for all, or one for each"
        )
    return [{METHOD: method} for method in methods]
