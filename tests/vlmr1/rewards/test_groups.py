"""The scoring of groups: methods by row and by file, columns of images, settings."""

import importlib

import pytest
import torch
from PIL import Image

import vlmr1.rewards
from tests.helpers.rewards import CAT, answered, group, sample, values
from vlmr1.errors import RewardError, SettingError
from vlmr1.rewards import RewardSettings, accuracy_reward, get_reward, score_groups
from vlmr1.rewards.methods import columns_of_files

HALF = answered("[0, 0, 5, 10]")


def test_the_method_of_a_row_wins_over_the_setting():
    groups = [
        group(sample(1, "A", accu_reward_method="mcq"), answered("(A)"), answered("(B)")),
        group(sample(2, "yes"), answered("(A)"), answered("Yes")),
        group(sample(3, "yes", accu_reward_method=None), answered("yes"), answered("no")),
    ]
    reward = get_reward("accuracy", RewardSettings(accu_reward_method="yes_no"))
    assert values(score_groups(groups, [reward])) == [[[1], [0]], [[0], [1]], [[1], [0]]]


def test_the_methods_of_data_files():
    assert columns_of_files(2, ["map", "iou"]) == [{"accu_reward_method": "map"}, {"accu_reward_method": "iou"}]
    assert columns_of_files(2, ["map"]) == []  # the rewards' own setting
    with pytest.raises(SettingError, match="accu_reward_method has 2 methods for 1 data files"):
        columns_of_files(1, ["map", "iou"])


def test_the_mode_changes_the_score():
    groups = [group(sample(1, "no", accu_reward_method="yes_no"), answered("I do not know"))]
    for mode, expected in (("strict", 0), ("vlm_r1", 1)):
        assert values(score_groups(groups, [get_reward("accuracy", RewardSettings(mode=mode))])) == [[[expected]]]


def test_a_function_of_ours_gets_the_settings_too():
    settings = RewardSettings(accu_reward_method="all_match")
    reward = get_reward(accuracy_reward, settings)
    assert reward.settings == settings and get_reward(reward) is reward
    assert values(score_groups([group(sample(1, "x"), answered("X"))], [reward])) == [[[1]]]


def test_rewards_of_length_count_the_tokens():
    """The helper's completions have one token a character."""
    settings = RewardSettings(max_completion_length=100, overlong_cache_length=40, length_reward_max=200)
    texts = [answered("x" * (length - len(answered("")))) for length in (60, 80, 100)]
    rewards = [get_reward(name, settings) for name in ("overlong", "length")]
    (scored,) = score_groups([group(sample(1, "no", accu_reward_method="yes_no"), *texts)], rewards)
    assert scored.rewards is not None
    assert scored.rewards[:, 0].tolist() == [0, -0.5, -1]
    expected = [-0.5 * (1 + torch.cos(torch.tensor(n / 200 * torch.pi)).item()) / 2 for n in (60, 80, 100)]
    assert scored.rewards[:, 1].tolist() == pytest.approx(expected, abs=1e-6)


def test_overlong_without_its_setting():
    with pytest.raises(RewardError, match="the reward overlong needs overlong_cache_length"):
        score_groups([group(sample(1), "x")], ["overlong"])
    for most in (0, 9):
        with pytest.raises(SettingError, match=r"^overlong_cache_length is 9: it must be at least 1 and below"):
            RewardSettings(overlong_cache_length=9, max_completion_length=most)


def test_length_by_a_judge_is_refused():
    with pytest.raises(RewardError, match="length needs an accu_reward_method other than llm"):
        score_groups([group(sample(1, accu_reward_method="llm"), "x")], ["length"])


def test_boxes_are_scaled_by_the_grid_and_the_size_of_the_image(tmp_path):
    """The model saw 28 x 56 px of an image of 10 x 20: its [0, 0, 14, 56] is the left half, [0, 0, 5, 20]."""
    path = tmp_path / "image.png"
    Image.new("RGB", (10, 20)).save(path)
    row = sample(1, "<answer>[0, 0, 10, 20]</answer>", [path], accu_reward_method="iou_qwen")
    images = [{"image_grid_thw": torch.tensor([[1, 4, 2]])}]
    for mode in ("strict", "vlm_r1"):
        settings = RewardSettings(mode=mode)
        groups = [group(row, answered("[0, 0, 14, 56]"), answered("[0, 0, 28, 56]"), images=images)]
        rewards = [get_reward(name, settings) for name in ("accuracy", "iou_qwen")]
        assert values(score_groups(groups, rewards)) == [[[0.5, 0.5], [1, 1]]]


def test_the_function_score_is_not_hidden_by_its_module():
    importlib.import_module("vlmr1.rewards.score")
    assert vlmr1.rewards.score("iou", HALF, CAT) == 0.5


def test_the_default_is_iou():
    assert values(score_groups([group(sample(1, CAT), HALF)], ["accuracy", "iou"])) == [[[0.5, 0.5]]]
