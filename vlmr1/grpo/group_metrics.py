"""Metrics of an update's groups: rewards, lengths, completions that no reward can read; log-probs that diverge."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch

from vlmr1.grpo.dynamic_sampling import has_equal_rewards
from vlmr1.rewards.aggregate import weighted_sum
from vlmr1.rewards.failures import unreadable
from vlmr1.rewards.registry import Reward
from vlmr1.types import Group

logger = logging.getLogger(__name__)


def group_metrics(groups: Sequence[Group], rewards: Sequence[Reward], weights: Sequence[float]) -> dict[str, float]:
    """All metrics of groups that have their rewards and advantages."""
    return group_statistics(groups, [reward.name for reward in rewards], weights) | unreadable(groups, rewards)


def group_statistics(groups: Sequence[Group], names: Sequence[str], weights: Sequence[float]) -> dict[str, float]:
    """Mean and std of each reward and of their weighted sum, lengths, shares of truncated completions and of groups
    whose rewards are all equal (without learning signal); where the KL is in the reward, its mean in nats."""
    rewards = torch.stack([group.rewards for group in groups if group.rewards is not None]).double()  # [P, G, R]
    total = weighted_sum(rewards, weights)  # [P, G]
    completions = [c for group in groups for c in group.completions]
    lengths = torch.tensor([len(c.token_ids) for c in completions], dtype=torch.float64)
    mean, std = _mean_and_std(total)
    out = {"reward": mean, "reward_std": std}
    for i, name in enumerate(names):
        mean, std = _mean_and_std(rewards[..., i])
        out |= {f"rewards/{name}/mean": mean, f"rewards/{name}/std": std}
    if all(group.kl is not None for group in groups):
        out["completion_kl"] = float(torch.cat([group.kl for group in groups if group.kl is not None]).mean())
    return out | {
        "zero_variance_groups": sum(has_equal_rewards(group, weights) for group in groups) / len(groups),
        "completion_length": float(lengths.mean()),
        "completion_length_max": float(lengths.max()),
        "truncated": sum(c.finish_reason == "length" for c in completions) / len(completions),
    }


def _mean_and_std(rewards: torch.Tensor) -> tuple[float, float]:
    """Mean of [P, G], and mean over groups of the deviation within each, both of the completions that were scored."""
    scored = ~rewards.isnan()
    if scored.all():
        return float(rewards.mean()), float(rewards.std(1).mean())
    groups = [group[known] for group, known in zip(rewards, scored, strict=True) if known.any()]
    if not groups:
        return math.nan, math.nan
    deviations = [float(group.std()) if len(group) > 1 else 0.0 for group in groups]
    return float(torch.cat(groups).mean()), sum(deviations) / len(deviations)


def warn_if_logp_differs(metrics: dict[str, float], step: int, threshold: float) -> None:
    """Warn when rollout and policy log-probs diverge."""
    difference = metrics.get("rollout/logp_difference", 0.0)
    if difference > threshold:
        logger.warning(
            "step %d: the log-probs of the rollout engine and of the policy differ by %.3f nats a token "
            "(rollout_logp_warn_threshold is %g); old_logprobs=recompute keeps them out of the ratio",
            step,
            difference,
            threshold,
        )
