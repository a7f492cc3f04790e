"""Completion -> score; one file a family of rewards, a registry by name."""

from vlmr1.rewards.accuracy import accuracy_reward
from vlmr1.rewards.format import format_reward
from vlmr1.rewards.registry import Reward, check_samples, get_reward, register
from vlmr1.rewards.score import score_groups

__all__ = [
    "Reward",
    "accuracy_reward",
    "check_samples",
    "format_reward",
    "get_reward",
    "register",
    "score_groups",
]
