"""Scores of several reward functions -> one reward a completion. NaN: the function does not apply to the completion."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmr1_kernels import group_advantages

STD_FLOOR = 1e-4


def weighted_sum(scores: Tensor, weights: Sequence[float]) -> Tensor:
    """[..., R] -> [...]: the weighted sum of the scores that apply; NaN where none does."""
    weight = torch.tensor(weights, dtype=scores.dtype)
    missing = scores.isnan()
    if not missing.any():
        return scores @ weight
    return (scores.nan_to_num(nan=0.0) @ weight).masked_fill(missing.all(-1), torch.nan)


def normalize(rewards: Tensor, size: int, scale: str) -> Tensor:
    """[B] -> [B]: (r - mean) / (std + 1e-4) over groups of `size`; `scale` is as in `group_advantages`.

    Mean and standard deviation are over the completions that have a reward. Those without one get 0."""
    scored = ~rewards.isnan()
    if scored.all():
        return group_advantages(rewards, size, scale=scale)
    out = torch.zeros_like(rewards)
    of_group = "group" if scale == "group" else "none"
    for own, known, place in zip(rewards.split(size), scored.split(size), out.split(size), strict=True):
        if known.any():
            place[known] = group_advantages(own[known], int(known.sum()), scale=of_group)
    return out / (_std(rewards[scored]) + STD_FLOOR) if scale == "batch" else out


def normalize_then_sum(scores: Tensor, weights: Sequence[float]) -> Tensor:
    """[G, R] -> [G]: each function's scores normalized over the group, then summed by weight (arXiv:2601.05242)."""
    columns = torch.stack([normalize(column, len(scores), "group") for column in scores.T], dim=1)
    return weighted_sum(columns.masked_fill(scores.isnan(), torch.nan), weights)


def normalize_batch(rewards: Tensor) -> Tensor:
    """[B] -> [B]: (r - mean) / (std + 1e-4) over all completions that have a reward; 0 for the others."""
    known = rewards[~rewards.isnan()]
    if not len(known):
        return torch.zeros_like(rewards)
    return ((rewards - known.mean()) / (_std(known) + STD_FLOOR)).nan_to_num(nan=0.0)


def _std(values: Tensor) -> Tensor:
    return values.std() if len(values) > 1 else torch.zeros_like(values).sum()
