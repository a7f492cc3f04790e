"""The rewards accuracy, and length, which depends on accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlmr1.errors import SettingError
from vlmr1.rewards.check import check_accuracy, check_length
from vlmr1.rewards.functions import Completions, Prompts, row_options, text_of
from vlmr1.rewards.judge import JudgeError
from vlmr1.rewards.methods import METHOD
from vlmr1.rewards.registry import register
from vlmr1.rewards.score import judged, score
from vlmr1.rewards.settings import DEFAULTS, RewardSettings

SYMBOLIC = ("default", "math")  # methods that call math-verify, which may take seconds


def _is_isolated(settings: RewardSettings, method: str) -> bool:
    # The judge has a time limit of its own.
    return method != "llm" and (settings.mode == "vlm_r1" or method in SYMBOLIC)


@register("accuracy", check=check_accuracy, with_settings=True, isolated=_is_isolated, images=True)
def accuracy_reward(
    prompts: Prompts,
    completions: Completions,
    *,
    solution: list[str],
    settings: RewardSettings = DEFAULTS,
    **columns: list[Any],
) -> list[float]:
    """Score each completion by the method in its row's column `accu_reward_method`, else by that of the settings."""
    methods = _methods(len(completions), settings, columns)
    asked = [i for i, method in enumerate(methods) if method == "llm"]
    texts = [text_of(completion) for completion in completions]
    values = _judged(asked, texts, solution, settings)
    for i, (text, truth) in enumerate(zip(texts, solution, strict=True)):
        if i not in values:
            row = row_options(columns, i) | {METHOD: methods[i]}
            values[i] = score("accuracy", text, truth, mode=settings.mode, **row)
    return [values[i] for i in range(len(texts))]


@register("length", check=check_length, with_settings=True, isolated=_is_isolated, images=True)
def length_reward(
    prompts: Prompts,
    completions: Completions,
    *,
    solution: list[str],
    completion_ids: list[list[int]],
    settings: RewardSettings = DEFAULTS,
    **columns: list[Any],
) -> list[float]:
    """Score the completion's length in tokens by a cosine; in mode strict its sign depends on the accuracy."""
    methods = _methods(len(completions), settings, columns)
    if settings.mode == "strict" and "llm" in methods:
        raise SettingError("the reward length needs an accu_reward_method other than llm")
    longest = settings.length_reward_max
    return [
        score(
            "length",
            text_of(completions[i]),
            truth,
            mode=settings.mode,
            **row_options(columns, i) | {METHOD: methods[i], "tokenizer": len(ids), "longest": longest},
        )
        for i, (truth, ids) in enumerate(zip(solution, completion_ids, strict=True))
    ]


def _judged(asked: Sequence[int], texts: Sequence[str], solution: Sequence[str], settings: RewardSettings) -> dict:
    if not asked:
        return {}
    try:
        values = judged([(texts[i], solution[i]) for i in asked], settings.judge, mode=settings.mode)
    except JudgeError as error:
        error.index = asked[error.index]
        raise
    return dict(zip(asked, values, strict=True))


def _methods(count: int, settings: RewardSettings, columns: dict[str, list[Any]]) -> list[str]:
    return [method or settings.accu_reward_method for method in columns.get(METHOD) or [None] * count]
