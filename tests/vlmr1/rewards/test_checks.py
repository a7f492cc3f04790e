"""Faults found before training: solutions that cannot be scored, unknown names, settings out of range."""

import json

import pytest

from tests.helpers.rewards import box
from vlmr1.errors import DataError, SettingError
from vlmr1.rewards import RewardSettings, accuracy_reward, check_samples, score
from vlmr1.types import Sample

CAT = box(0, 0, 100, 100)


def row(solution, **columns):
    return Sample([], (), f"<answer>{solution}</answer>", "data.jsonl:7", 0, columns)


@pytest.mark.parametrize(
    "reward, method, solution, message",
    [
        ("accuracy", "mcp", "A", "accu_reward_method 'mcp' is unknown; did you mean 'mcq'? Known: default, mcq"),
        ("accuracy", "map", json.dumps([{"bbox_2d": [0, 0, 1, 1]}]), "the solution is neither None nor a list"),
        ("accuracy", "od_ap", json.dumps([box(5, 5, 5, 5)]), "the solution is neither None nor a list"),
        ("accuracy", "weighted_sum", "[{oops", "the solution is neither None nor a list"),
        ("accuracy", "point_in_box", "[1, 2]", "the solution has no box"),
        ("length", "iou", "[1, 2]", "the solution has no box"),
        ("iou", None, "[1, 2]", "the solution has no box"),
        ("accuracy", None, "[1, 1, 1, 1]", "the solution has no box"),
        (
            accuracy_reward,
            None,
            "7",
            "the solution has no box: '<answer>7</answer>'; it must hold {",
        ),
        ("counting", None, "many", "the solution is no count"),
        ("point_in_box", None, "[1, 2]", "the solution has no box"),
    ],
)
def test_a_solution_that_cannot_be_scored_is_found_before_training(reward, method, solution, message):
    with pytest.raises(DataError) as caught:
        check_samples(["format", reward], [row(solution, accu_reward_method=method)])
    assert str(caught.value).startswith(f"data.jsonl:7: {message}")


@pytest.mark.parametrize(
    "method, solution",
    [
        ("mcq", "(b)"),
        ("yes_no", "Yes."),
        ("default", "cat"),
        ("map", "None"),
        ("od_ap", json.dumps([CAT])),
        ("iou_qwen", "[0,0,1,1]"),
    ],
)
def test_a_solution_that_can_be_scored_passes(method, solution):
    check_samples(["accuracy", "length", "format"], [row(solution, accu_reward_method=method)])


def test_a_solution_that_the_published_code_cannot_score():
    settings = RewardSettings(mode="vlm_r1", accu_reward_method="iou")
    with pytest.raises(DataError, match=r"data.jsonl:7: JSONDecodeError: Expecting value"):
        check_samples(["accuracy"], [row("seven")], settings)
    check_samples(["accuracy"], [row("seven", accu_reward_method="mcp")], settings)


def test_the_published_length_needs_no_method():
    """It reads a fence of the solution, and has no use for the method."""
    settings = RewardSettings(mode="vlm_r1")
    check_samples(["length"], [row("seven")], settings)
    with pytest.raises(DataError, match=r"data.jsonl:7: JSONDecodeError"):
        check_samples(["length"], [row("```json\n[{\n```")], settings)


def test_unknown_names():
    with pytest.raises(SettingError, match="unknown reward 'acuracy'"):
        score("acuracy", "", "")
    with pytest.raises(SettingError, match="reward_mode is 'x'"):
        score("accuracy", "", "", mode="x")
    with pytest.raises(SettingError, match="accu_reward_method 'x' is unknown"):
        score("accuracy", "", "", accu_reward_method="x")
