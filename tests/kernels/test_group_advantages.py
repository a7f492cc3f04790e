import pytest
import torch

from vlmr1_kernels import group_advantages

REWARDS = torch.tensor([1.0, 0.0, 0.5, 0.0, 3.0, 1.0, 1.0, 7.0], dtype=torch.float64)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equals_the_formula(scale: str) -> None:
    groups = REWARDS.reshape(2, 4)
    expected = groups - groups.mean(1, keepdim=True)
    if scale != "none":
        expected = expected / ((groups.std(1, keepdim=True) if scale == "group" else REWARDS.std()) + 1e-4)
    torch.testing.assert_close(group_advantages(REWARDS, 4, scale=scale), expected.reshape(-1))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("value", [0.1, -7.3, 1e30], ids=str)
def test_equal_rewards_give_exactly_zero(scale: str, value: float) -> None:
    # 0.1 * 3 / 3 is not 0.1 in floating point: a plain mean leaves a rest that the small std would blow up.
    assert group_advantages(torch.full((6,), value), 3, scale=scale).tolist() == [0.0] * 6


def test_one_group_of_equal_rewards_among_others() -> None:
    advantages = group_advantages(torch.tensor([0.1, 0.1, 0.1, 0.0, 0.0, 1.0]), 3)
    assert advantages[:3].tolist() == [0.0] * 3
    assert advantages[3:].tolist() == pytest.approx([-0.57725, -0.57725, 1.15450], abs=1e-4)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_group_of_one_and_no_rewards(scale: str) -> None:
    assert group_advantages(torch.tensor([2.0]), 1, scale=scale).tolist() == [0.0]
    assert group_advantages(torch.empty(0), 4, scale=scale).tolist() == []


@pytest.mark.parametrize(
    ("rewards", "generations", "scale", "message"),
    [
        (torch.ones(6), 4, "group", "num_generations is 4; rewards has 6"),
        (torch.ones(6), 0, "group", "num_generations is 0"),
        (torch.ones(2, 3), 3, "group", "rewards must be"),
        (torch.ones(6, dtype=torch.int64), 3, "group", "rewards must be float64"),
        (torch.ones(6), 3, "batches", "scale is 'batches'"),
    ],
    ids=["multiple", "none", "shape", "dtype", "scale"],
)
def test_bad_input_is_named(rewards: torch.Tensor, generations: int, scale: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards, generations, scale=scale)
