"""Shares of completions that a reward cannot parse: no answer, or no box or point in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from vlmr1.rewards.answer import find_answer, labelled_boxes, parse_box
from vlmr1.rewards.methods import METHOD_REWARDS, method_of
from vlmr1.rewards.registry import Reward
from vlmr1.rewards.settings import DEFAULTS
from vlmr1.rewards.strict.point import parse_point
from vlmr1.types import Group, Sample

ANSWERED = (*METHOD_REWARDS, "iou", "iou_qwen", "iou_internvl", "iou_glm", "counting", "point_in_box")
# Parsers of an answer by accuracy method or reward; they return None where they fail.
BOXES: dict[str, Callable[[str], object | None]] = {
    **dict.fromkeys(("iou", "iou_qwen", "iou_internvl", "iou_glm"), parse_box),
    **dict.fromkeys(("map", "od_ap", "od_ap50", "odLength", "weighted_sum"), labelled_boxes),
    "point_in_box": parse_point,
}


def unreadable(groups: Sequence[Group], rewards: Iterable[Reward]) -> dict[str, float]:
    """Return `parse_failures` and `box_failures`, where a reward needs an answer or boxes.

    `parse_failures` is the share of completions without a closed `<answer>`. `box_failures` is the share without a
    readable box or point, of the completions whose boxes or points a reward reads."""
    needing = [reward for reward in rewards if reward.name in ANSWERED]
    if not needing:
        return {}
    missing: list[bool] = []
    no_box: list[bool] = []
    for group in groups:
        readers = [BOXES[kind] for kind in (_kind(each, group.prompt.sample) for each in needing) if kind in BOXES]
        for completion in group.completions:
            answer = find_answer(completion.text)
            missing.append(answer is None)
            if readers:
                no_box.append(answer is None or any(read(answer) is None for read in readers))
    shares = {"parse_failures": missing, "box_failures": no_box}
    return {name: sum(each) / len(each) for name, each in shares.items() if each}


def _kind(reward: Reward, sample: Sample) -> str:
    """The accuracy method of a row, or the reward's own name."""
    if reward.name not in METHOD_REWARDS:
        return reward.name
    return method_of(sample, reward.settings or DEFAULTS)
