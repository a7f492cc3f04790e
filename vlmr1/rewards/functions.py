"""The built-in rewards as batch functions with TRL's signature; accuracy and length are in accuracy.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vlmr1.errors import SettingError
from vlmr1.rewards.check import check_lengths, check_solution
from vlmr1.rewards.length import overlong
from vlmr1.rewards.registry import register
from vlmr1.rewards.score import score
from vlmr1.rewards.settings import DEFAULTS, RewardSettings

Prompts = list[list[dict[str, Any]]]
Completions = list[list[dict[str, str]]]


def _is_isolated(settings: RewardSettings, method: str) -> bool:
    return settings.mode == "vlm_r1"  # its regular expressions backtrack


@register("overlong", check=check_lengths, with_settings=True)
def overlong_reward(
    prompts: Prompts,
    completions: Completions,
    *,
    completion_ids: list[list[int]],
    settings: RewardSettings = DEFAULTS,
    **columns: list[Any],
) -> list[float]:
    """DAPO's soft punishment of overlong completions: 0 to -1 over the last `overlong_cache_length` tokens."""
    longest, cache = settings.max_completion_length, settings.overlong_cache_length
    if longest is None or cache is None:
        raise SettingError("the reward overlong needs overlong_cache_length")
    return [overlong(len(ids), longest, cache) for ids in completion_ids]


def _simple(name: str, *, truth: bool = False, images: bool = False) -> Callable[..., list[float]]:
    """Register the batch function of a scorer; with `truth` every solution is checked before training."""

    def function(
        prompts: Prompts,
        completions: Completions,
        *,
        solution: list[str] | None = None,
        settings: RewardSettings = DEFAULTS,
        **columns: list[Any],
    ) -> list[float]:
        truths = [""] * len(completions) if solution is None else solution
        common = {"allow_empty_think": settings.allow_empty_think}
        return [
            score(name, text_of(completion), truth, mode=settings.mode, **common | row_options(columns, i))
            for i, (completion, truth) in enumerate(zip(completions, truths, strict=True))
        ]

    function.__name__ = function.__qualname__ = f"{name}_reward"
    function.__doc__ = f"The scorer `{name}` of each completion."
    check = check_solution(name) if truth else None
    return register(name, check=check, with_settings=True, isolated=_is_isolated, images=images)(function)


format_reward = _simple("format")
format_rec_qwen_reward = _simple("format_rec_qwen")
format_rec_internvl_reward = _simple("format_rec_internvl")
format_rec_glm_reward = _simple("format_rec_glm")
repetition_reward = _simple("repetition")
iou_reward = _simple("iou", truth=True)
iou_qwen_reward = _simple("iou_qwen", truth=True, images=True)
iou_internvl_reward = _simple("iou_internvl", truth=True)
iou_glm_reward = _simple("iou_glm", truth=True)
counting_reward = _simple("counting", truth=True)
point_in_box_reward = _simple("point_in_box", truth=True)


def row_options(columns: dict[str, list[Any]], i: int) -> dict[str, Any]:
    """The columns of one row that scorers take."""
    names = ("image_grid_thw", "image_size", "box_scale", "think_opening")
    return {name: columns[name][i] for name in names if name in columns}


def text_of(completion: list[dict[str, str]]) -> str:
    return completion[-1]["content"]
