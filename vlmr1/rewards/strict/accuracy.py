"""The strict accuracy reward: a table of methods by name."""

from __future__ import annotations

from typing import Any

from vlmr1.errors import SettingError
from vlmr1.rewards.coco import AP50
from vlmr1.rewards.strict.counting import counting
from vlmr1.rewards.strict.detection import mean_ap, weighted_sum
from vlmr1.rewards.strict.iou import plain_iou, rec_iou, scaled_iou
from vlmr1.rewards.strict.point import point_in_box
from vlmr1.rewards.strict.text import all_match, default, math, mcq, yes_no

METHODS = {
    "default": default,
    "mcq": mcq,
    "yes_no": yes_no,
    "math": math,
    **dict.fromkeys(("map", "od_ap"), mean_ap),
    "od_ap50": lambda content, solution, **options: mean_ap(content, solution, AP50, **options),
    "odLength": lambda content, solution, **options: mean_ap(content, solution, by_count=True, **options),
    "weighted_sum": weighted_sum,
    "all_match": all_match,
    "iou": rec_iou,
    **dict.fromkeys(("iou_internvl", "iou_glm"), plain_iou),
    "iou_qwen": scaled_iou,
    "counting": counting,
    "point_in_box": point_in_box,
}


def accuracy(content: str, solution: str, *, accu_reward_method: str, **options: Any) -> float:
    """Return the method's score. SettingError for an unknown method, ValueError for a solution that it cannot score."""
    if accu_reward_method not in METHODS:
        raise SettingError(f"accu_reward_method {accu_reward_method!r} is unknown; known: {', '.join(METHODS)}, llm")
    return float(METHODS[accu_reward_method](content, solution, **options))
