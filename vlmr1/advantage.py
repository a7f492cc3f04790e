"""Scores of a group -> advantages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from vlmr1.scale.ranks import ALONE, Ranks
from vlmr1.types import Group
from vlmr1_kernels import group_advantages


def with_advantages(groups: Sequence[Group], weights: Sequence[float], scale: str, ranks: Ranks = ALONE) -> list[Group]:
    """A_i = (r_i - mean(r)) / (std(r) + 1e-4) over each group, r the weighted sum of the reward functions.

    `scale`: "group", "batch" (std over all groups of all ranks) or "none"; equal rewards give 0."""
    weight = torch.tensor(weights, dtype=torch.float32)
    own = torch.cat([group.rewards @ weight for group in groups if group.rewards is not None])  # [B]
    everyone = ranks.gather(own)
    start = sum(map(len, everyone[: ranks.rank]))
    sizes = {len(group.completions) for group in groups}
    if len(sizes) != 1:
        raise ValueError(f"groups of one step differ in size: {sorted(sizes)}")
    advantages = group_advantages(torch.cat(everyone), sizes.pop(), scale=scale)[start : start + len(own)]
    parts = advantages.split([len(group.completions) for group in groups])
    return [replace(group, advantages=part) for group, part in zip(groups, parts, strict=True)]
