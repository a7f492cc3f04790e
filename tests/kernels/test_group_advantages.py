import pytest
import torch
from torch import Tensor

from tests.helpers.kernel_cases import Target
from vlmr1_kernels import group_advantages
from vlmr1_kernels.testing import assert_within_budget

OP = "group_advantages"
pytestmark = pytest.mark.usefixtures("poison")

REWARDS = [1.0, 0.0, 0.5, 0.0, 3.0, 1.0, 1.0, 7.0, 0.1, 0.1, 0.1, 0.1]


def by_the_formula(rewards: Tensor, generations: int, scale: str) -> Tensor:
    groups = rewards.reshape(-1, generations)
    expected = groups - groups.mean(1, keepdim=True)
    if scale != "none":
        expected = expected / ((groups.std(1, keepdim=True) if scale == "group" else rewards.std()) + 1e-4)
    return expected.reshape(-1)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equals_the_formula(scale: str) -> None:
    rewards = torch.tensor(REWARDS, dtype=torch.float64)
    torch.testing.assert_close(group_advantages(rewards, 4, scale=scale), by_the_formula(rewards, 4, scale))


@pytest.mark.parametrize(
    ("groups", "generations", "scale", "dtype"),
    [
        (3, 4, "group", torch.float32),
        (3, 4, "batch", torch.float32),
        (3, 4, "none", torch.float32),
        (1, 129, "group", torch.float32),
        (22_000, 3, "group", torch.float32),
        (22_000, 3, "batch", torch.float32),
        (5, 8, "group", torch.bfloat16),
        (5, 8, "batch", torch.float16),
    ],
    ids=["group", "batch", "none", "one large group", "many groups", "many in a batch", "bfloat16", "float16"],
)
def test_error_is_within_budget(target: Target, groups: int, generations: int, scale: str, dtype: torch.dtype) -> None:
    rewards = (torch.randn(groups * generations, dtype=torch.float64) + 2).to(dtype)
    value = target.run(dtype)(rewards.to(target.device), generations, scale=scale)
    assert value.dtype == dtype
    exact = by_the_formula(rewards.double(), generations, scale)
    assert_within_budget(["advantages"], [value.cpu()], [by_the_formula(rewards, generations, scale)], [exact])


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("value", [0.1, -7.3, 1e30], ids=str)
def test_equal_rewards_give_exactly_zero(target: Target, scale: str, value: float) -> None:
    # 0.1 * 3 / 3 is not 0.1 in floating point: a plain mean leaves a rest that the small std would blow up.
    rewards = torch.full((6,), value, device=target.device)
    assert target.run(torch.float32)(rewards, 3, scale=scale).tolist() == [0.0] * 6


def test_one_group_of_equal_rewards_among_others(target: Target) -> None:
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.0, 0.0, 1.0], device=target.device)
    advantages = target.run(torch.float32)(rewards, 3)
    assert advantages[:3].tolist() == [0.0] * 3
    assert advantages[3:].tolist() == pytest.approx([-0.57725, -0.57725, 1.15450], abs=1e-4)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_group_of_one_and_no_rewards(target: Target, scale: str) -> None:
    run = target.run(torch.float32)
    assert run(torch.tensor([2.0], device=target.device), 1, scale=scale).tolist() == [0.0]
    assert run(torch.empty(0, device=target.device), 4, scale=scale).tolist() == []


def test_strides_do_not_matter(target: Target) -> None:
    rewards = torch.tensor(REWARDS, device=target.device)
    run = target.run(torch.float32)
    assert torch.equal(run(rewards.repeat_interleave(2)[::2], 4), run(rewards, 4))
