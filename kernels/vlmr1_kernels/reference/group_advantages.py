"""Group-relative advantages."""

from torch import Tensor

from vlmr1_kernels.inputs import LossInputs

STD_FLOOR = 1e-4


def group_advantages(rewards: Tensor, num_generations: int, *, scale: str) -> Tensor:
    groups = rewards.view(-1, num_generations)  # [P, G]
    # Relative to the first reward of the group, so that equal rewards cancel exactly in any dtype.
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


def resolve_advantages(inputs: LossInputs) -> Tensor:
    """Return the given advantages [B], or those of the rewards."""
    if inputs.advantages is not None:
        return inputs.advantages
    assert inputs.rewards is not None and inputs.num_generations is not None
    return group_advantages(inputs.rewards, inputs.num_generations, scale="group")
