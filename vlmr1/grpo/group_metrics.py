"""What a step's groups tell: rewards, lengths, and why a reward may be flat."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vlmr1.types import Group


def group_statistics(groups: Sequence[Group], names: Sequence[str], weights: Sequence[float]) -> dict[str, float]:
    """Mean and std of each reward and of their weighted sum, lengths, shares of truncated completions and of groups
    whose rewards are all equal (which teach nothing); of the KL of a completion in nats, where it is in the reward."""
    rewards = torch.stack([group.rewards for group in groups if group.rewards is not None]).double()  # [P, G, R]
    total = rewards @ torch.tensor(weights, dtype=torch.float64)  # [P, G]
    completions = [c for group in groups for c in group.completions]
    lengths = torch.tensor([len(c.token_ids) for c in completions], dtype=torch.float64)
    out = {"reward": float(total.mean()), "reward_std": float(total.std(1).mean())}
    for i, name in enumerate(names):
        out[f"rewards/{name}/mean"] = float(rewards[..., i].mean())
        out[f"rewards/{name}/std"] = float(rewards[..., i].std(1).mean())
    if all(group.kl is not None for group in groups):
        out["completion_kl"] = float(torch.cat([group.kl for group in groups if group.kl is not None]).mean())
    return out | {
        "zero_variance_groups": float((total.max(1).values == total.min(1).values).double().mean()),
        "completion_length": float(lengths.mean()),
        "completion_length_max": float(lengths.max()),
        "truncated": sum(c.finish_reason == "length" for c in completions) / len(completions),
    }
