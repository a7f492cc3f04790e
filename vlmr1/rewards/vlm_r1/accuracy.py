"""The published accuracy reward: one of several methods, by name."""

from __future__ import annotations

from typing import Any

from vlmr1.rewards.coco import AP50
from vlmr1.rewards.vlm_r1.detection import answer_ap, mean_ap, weighted_sum
from vlmr1.rewards.vlm_r1.iou import IOUS
from vlmr1.rewards.vlm_r1.text import all_match, default, math, mcq, yes_no

METHODS = {
    "mcq": mcq,
    "yes_no": yes_no,
    "math": math,
    "map": mean_ap,
    "od_ap": answer_ap,
    "od_ap50": lambda content, solution: answer_ap(content, solution, AP50),
    "odLength": lambda content, solution: answer_ap(content, solution, by_count=True),
    "weighted_sum": weighted_sum,
    "all_match": all_match,
}


def accuracy(content: str, solution: str, *, accu_reward_method: str, **options: Any) -> float:
    """The method's score; an unknown method is the default one, as published."""
    if accu_reward_method in IOUS:
        return IOUS[accu_reward_method](content, solution, **options)
    return float(METHODS.get(accu_reward_method, default)(content, solution))
