"""Shares of completions that a reward cannot parse: no answer, or no box or point in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from vlmr1.rewards.answer import box_text, find_answer, labelled_boxes, lacks_thought, parse_box, parse_point
from vlmr1.rewards.methods import METHOD_REWARDS, method_of
from vlmr1.rewards.registry import Reward
from vlmr1.rewards.settings import DEFAULTS
from vlmr1.types import Group, Sample

ANSWERED = (*METHOD_REWARDS, "iou", "iou_qwen", "iou_internvl", "iou_glm", "counting", "point_in_box")
FORMATS = ("format", "format_rec_qwen", "format_rec_internvl", "format_rec_glm")
# Parsers of an answer by accuracy method or reward; they return None where they fail.
BOXES: dict[str, Callable[[str], object | None]] = {
    **dict.fromkeys(("iou", "iou_qwen", "iou_internvl", "iou_glm"), parse_box),
    **dict.fromkeys(("map", "od_ap", "od_ap50", "odLength", "weighted_sum"), labelled_boxes),
    "point_in_box": parse_point,
}


def unreadable(groups: Sequence[Group], rewards: Iterable[Reward]) -> dict[str, float]:
    """Return `parse_failures` and `box_failures`, where a reward needs an answer or boxes, and `empty_think`.

    `parse_failures` is the share of completions without a closed `<answer>`, and without a box or point where those are
    read. `box_failures` is the share without a readable box or point, of the completions whose boxes or points a reward
    reads. `empty_think`, only where it is not 0, is the share that the reward `format` counts as 0 because of an empty
    thought."""
    rewards = list(rewards)
    needing = [reward for reward in rewards if reward.name in ANSWERED]
    if not needing:
        return empty_thoughts(groups, rewards)
    as_published = any((reward.settings or DEFAULTS).mode != "strict" for reward in needing)  # it needs the tags
    missing: list[bool] = []
    no_box: list[bool] = []
    for group in groups:
        readers = [BOXES[kind] for kind in (_kind(each, group.prompt.sample) for each in needing) if kind in BOXES]
        for completion in group.completions:
            content = group.prompt.think_opening + completion.text
            text = box_text(content)
            without = text is None or any(read(text) is None for read in readers)
            missing.append(find_answer(content) is None and (without or not readers or as_published))
            if readers:
                no_box.append(without)
    shares = {"parse_failures": missing, "box_failures": no_box}
    found = {name: sum(each) / len(each) for name, each in shares.items() if each}
    return found | empty_thoughts(groups, rewards)


def empty_thoughts(groups: Sequence[Group], rewards: Iterable[Reward]) -> dict[str, float]:
    """Return `empty_think`, see `unreadable`."""
    known = [reward.settings or DEFAULTS for reward in rewards if reward.name in FORMATS]
    if not any(each.mode == "strict" and not each.allow_empty_think for each in known):
        return {}
    texts = [group.prompt.think_opening + completion.text for group in groups for completion in group.completions]
    share = sum(map(lacks_thought, texts)) / len(texts)
    return {"empty_think": share} if share else {}


def _kind(reward: Reward, sample: Sample) -> str:
    """The accuracy method of a row, or the reward's own name."""
    if reward.name not in METHOD_REWARDS:
        return reward.name
    return method_of(sample, reward.settings or DEFAULTS)
