"""Scores of a group -> advantages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vlmr1.distributed.ranks import ALONE, Ranks
from vlmr1.rewards.aggregate import normalize, normalize_batch, normalize_then_sum, weighted_sum
from vlmr1.types import Group


def with_advantages(
    groups: Sequence[Group],
    weights: Sequence[float],
    scale: str,
    ranks: Ranks = ALONE,
    *,
    kl_weight: float = 0.0,
    aggregation: str = "sum_then_normalize",
) -> list[Group]:
    """A_i = (r_i - mean(r)) / (std(r) + 1e-4) over each group, r the weighted sum of the reward functions, less
    `kl_weight` times the completion's KL to the reference where that is in the reward.

    `scale`: "group", "batch" (std over all groups of all ranks) or "none"; equal rewards give 0. With
    `aggregation="normalize_then_sum"` each function is normalized over its group, and the sum over the batch. A
    completion that no function scored has advantage 0 and is in no mean."""
    decoupled = aggregation == "normalize_then_sum"
    own = torch.cat([_reward(group, weights, kl_weight, decoupled) for group in groups])  # [B]
    everyone = ranks.all_gather(own)
    start = sum(map(len, everyone[: ranks.rank]))
    sizes = {len(group.completions) for group in groups}
    if len(sizes) != 1:
        raise ValueError(f"groups of one step differ in size: {sorted(sizes)}")
    every = torch.cat(everyone)
    advantages = normalize_batch(every) if decoupled else normalize(every, sizes.pop(), scale)
    parts = advantages[start : start + len(own)].split([len(group.completions) for group in groups])
    return [replace(group, advantages=part) for group, part in zip(groups, parts, strict=True)]


def _reward(group: Group, weights: Sequence[float], kl_weight: float, decoupled: bool) -> Tensor:
    """[G]"""
    assert group.rewards is not None
    reward = (normalize_then_sum if decoupled else weighted_sum)(group.rewards, weights)
    return reward if group.kl is None else reward - kl_weight * group.kl
