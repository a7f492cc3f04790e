"""Rewards relative to their group."""

from torch import Tensor

STD_FLOOR = 1e-4


def group_advantages(rewards: Tensor, num_generations: int, *, scale: str) -> Tensor:
    groups = rewards.view(-1, num_generations)  # [P, G]
    # Against the group's first reward, not against 0: equal rewards then cancel exactly in any dtype.
    shifted = groups - groups[:, :1]
    centered = shifted - shifted.mean(dim=1, keepdim=True)
    if scale == "none":
        return centered.reshape(-1)
    if scale == "group":
        std = centered.square().sum(dim=1, keepdim=True).div(max(num_generations - 1, 1)).sqrt()  # [P, 1]
    else:
        spread = rewards - rewards.mean() if rewards.numel() else rewards
        std = spread.square().sum().div(max(rewards.numel() - 1, 1)).sqrt()
    return (centered / (std + STD_FLOOR)).reshape(-1)


def given_or_grouped(advantages: Tensor | None, rewards: Tensor | None, num_generations: int | None) -> Tensor:
    """The advantages, or those that the rewards make."""
    if advantages is not None:
        return advantages
    assert rewards is not None and num_generations is not None
    return group_advantages(rewards, num_generations, scale="group")
