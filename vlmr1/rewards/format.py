"""The format reward: thinking first, then an answer, and nothing else."""

from __future__ import annotations

from typing import Any

from vlmr1.rewards.answer import has_format
from vlmr1.rewards.registry import register


@register("format")
def format_reward(
    prompts: list[list[dict[str, Any]]], completions: list[list[dict[str, str]]], **columns: list[Any]
) -> list[float]:
    """1 where the whole completion is `<think>..</think><answer>..</answer>`, neither empty; else 0."""
    return [float(has_format(completion[-1]["content"])) for completion in completions]
