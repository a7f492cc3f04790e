"""Scores of a group -> advantages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vlmr1.distributed.ranks import ALONE, Ranks
from vlmr1.types import Group
from vlmr1_kernels import group_advantages


def with_advantages(
    groups: Sequence[Group], weights: Sequence[float], scale: str, ranks: Ranks = ALONE, *, kl_weight: float = 0.0
) -> list[Group]:
    """A_i = (r_i - mean(r)) / (std(r) + 1e-4) over each group, r the weighted sum of the reward functions, less
    `kl_weight` times the completion's KL to the reference where that is in the reward.

    `scale`: "group", "batch" (std over all groups of all ranks) or "none"; equal rewards give 0."""
    weight = torch.tensor(weights, dtype=torch.float32)
    own = torch.cat([_reward(group, weight, kl_weight) for group in groups])  # [B]
    everyone = ranks.all_gather(own)
    start = sum(map(len, everyone[: ranks.rank]))
    sizes = {len(group.completions) for group in groups}
    if len(sizes) != 1:
        raise ValueError(f"groups of one step differ in size: {sorted(sizes)}")
    advantages = group_advantages(torch.cat(everyone), sizes.pop(), scale=scale)[start : start + len(own)]
    parts = advantages.split([len(group.completions) for group in groups])
    return [replace(group, advantages=part) for group, part in zip(groups, parts, strict=True)]


def _reward(group: Group, weight: Tensor, kl_weight: float) -> Tensor:
    """[G]"""
    assert group.rewards is not None
    reward = group.rewards @ weight
    return reward if group.kl is None else reward - kl_weight * group.kl
