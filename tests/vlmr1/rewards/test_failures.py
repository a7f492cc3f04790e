"""Shares of completions that a reward cannot read, on texts written out."""

import pytest
import torch

from vlmr1.rewards.failures import unreadable
from vlmr1.rewards.registry import get_reward
from vlmr1.rewards.settings import RewardSettings
from vlmr1.types import Completion, Group, Prompt, Sample

BOX, LIST = '{"bbox_2d": [1, 2, 3, 4]}', '[{"bbox_2d": [1, 2, 3, 4], "label": "cat"}]'
TEXTS = (
    f"<answer>{BOX}</answer>",
    f"<answer>{LIST}</answer>",
    "<answer>12, 30</answer>",
    "<answer>a cat</answer>",
    f"<think>never closed <answer>{BOX}",
    "nothing",
)


def group(method: str | None = None) -> Group:
    columns = {} if method is None else {"accu_reward_method": method}
    prompt = Prompt(Sample([], (), "", "", 0, columns), torch.zeros(3, dtype=torch.int64), torch.zeros(3, 3))
    ids = torch.zeros(1, dtype=torch.int64)
    return Group(prompt, tuple(Completion(ids, None, None, text, "stop") for text in TEXTS))


@pytest.mark.parametrize(
    ("reward", "method", "column", "expected"),
    [
        pytest.param("accuracy", "iou", None, {"parse_failures": 2 / 6, "box_failures": 4 / 6}, id="one box"),
        pytest.param("accuracy", "od_ap", None, {"parse_failures": 2 / 6, "box_failures": 4 / 6}, id="labelled boxes"),
        pytest.param("accuracy", "point_in_box", None, {"parse_failures": 2 / 6, "box_failures": 3 / 6}, id="point"),
        pytest.param("accuracy", "default", None, {"parse_failures": 2 / 6}, id="no boxes"),
        pytest.param("accuracy", "iou", "mcq", {"parse_failures": 2 / 6}, id="the row's own method"),
        pytest.param("counting", "iou", None, {"parse_failures": 2 / 6}, id="another reward"),
        pytest.param("iou_qwen", "mcq", None, {"parse_failures": 2 / 6, "box_failures": 4 / 6}, id="by its name"),
        pytest.param("format", "iou", None, {}, id="needs no answer"),
    ],
)
def test_unreadable(reward, method, column, expected):
    found = get_reward(reward, RewardSettings(accu_reward_method=method))
    assert unreadable([group(column)], [found]) == pytest.approx(expected)


def test_boxes_are_counted_among_the_rows_that_have_them():
    """For a group about boxes and one about words, four of six have no box, and four of twelve no answer."""
    reward = get_reward("accuracy", RewardSettings(accu_reward_method="iou"))
    assert unreadable([group(), group("yes_no")], [reward]) == pytest.approx(
        {"parse_failures": 4 / 12, "box_failures": 4 / 6}
    )


def test_a_function_of_the_users_needs_nothing():
    assert unreadable([group()], [get_reward(lambda prompts, completions, **_: [0.0] * len(completions))]) == {}
