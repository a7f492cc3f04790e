"""Reward functions: completion -> score. docs/rewards.md describes the rewards and the two modes, strict and vlm_r1."""

from typing import TYPE_CHECKING, Any

from vlmr1.rewards.accuracy import accuracy_reward
from vlmr1.rewards.functions import format_reward
from vlmr1.rewards.judge import Judge
from vlmr1.rewards.pool import RewardPool
from vlmr1.rewards.registry import Reward, check_samples, get_reward, register
from vlmr1.rewards.score import score
from vlmr1.rewards.settings import RewardSettings

if TYPE_CHECKING:
    from vlmr1.rewards.groups import TimedOut, score_groups

__all__ = [
    "Judge",
    "Reward",
    "RewardPool",
    "RewardSettings",
    "TimedOut",
    "accuracy_reward",
    "check_samples",
    "format_reward",
    "get_reward",
    "register",
    "score",
    "score_groups",
]


def __getattr__(name: str) -> Any:
    """Import `groups` on first use: it needs torch, which worker processes of the pool start without."""
    if name in ("TimedOut", "score_groups"):
        from vlmr1.rewards import groups

        return getattr(groups, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
