"""Completions -> scores: each reward function is called once for all completions of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from vlmr1.errors import RewardError
from vlmr1.rewards.registry import Reward, get_reward
from vlmr1.types import Completion, Group, Sample

FLOAT32_MAX = torch.finfo(torch.float32).max
NUMBER = (int, float, np.integer, np.floating, np.bool_)

Row = tuple[Sample, Completion]


def score_groups(groups: Sequence[Group], reward_functions: Sequence[str | Reward | Callable]) -> list[Group]:
    """The groups with their rewards [G, R] float32 filled in, one column a reward function.

    Raises RewardError, with the function and the row, where a function raises, returns another number of
    values than there are completions, or a value that is not a finite number.
    """
    rows = [(group.prompt.sample, completion) for group in groups for completion in group.completions]  # B
    if not rows:
        return list(groups)
    columns = [_call(get_reward(reward), rows) for reward in reward_functions]  # R lists of B
    rewards = torch.tensor(columns, dtype=torch.float32).reshape(len(columns), len(rows)).T  # [B, R]
    parts = rewards.split([len(group.completions) for group in groups])
    return [replace(group, rewards=part.contiguous()) for group, part in zip(groups, parts, strict=True)]


def _call(reward: Reward, rows: Sequence[Row]) -> list[float]:
    """One reward's B scores."""
    try:
        values = reward(**_arguments(rows))
    except Exception as error:  # the user's code: anything can come out of it
        raise RewardError(f"reward {reward.name}: raised {error!r} {_blame(reward, rows)}") from error
    if isinstance(values, torch.Tensor | np.ndarray):
        values = values.tolist()
    if not isinstance(values, list | tuple):
        raise RewardError(
            f"reward {reward.name}: returned {type(values).__name__}, not a list of numbers, {_span(rows)}"
        )
    if len(values) != len(rows):
        raise RewardError(
            f"reward {reward.name}: returned {len(values)} values for {len(rows)} completions, {_span(rows)}"
        )
    return [_number(value, reward, row) for value, row in zip(values, rows, strict=True)]


def _arguments(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Arguments of a reward function, B values each. A column that some rows lack is left out."""
    shared = set.intersection(*(set(sample.columns) for sample, _ in rows))
    arguments = {name: [sample.columns[name] for sample, _ in rows] for name in sorted(shared)}
    return arguments | {
        "prompts": [sample.messages for sample, _ in rows],
        "completions": [[{"role": "assistant", "content": completion.text}] for _, completion in rows],
        "completion_ids": [completion.token_ids.tolist() for _, completion in rows],
        "solution": [sample.solution for sample, _ in rows],
    }


def _number(value: object, reward: Reward, row: Row) -> float:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if not isinstance(value, NUMBER) or not abs(value) <= FLOAT32_MAX:  # NaN compares false
        raise RewardError(f"reward {reward.name}: returned {value!r}, not a finite number, {_describe(row)}")
    return float(value)


def _blame(reward: Reward, rows: Sequence[Row]) -> str:
    """Which row made the function raise: the first that does so alone, if there is one."""
    for row in rows:
        try:
            reward(**_arguments([row]))
        except Exception:  # the user's code again; the first exception is the one that is chained
            return _describe(row)
    return f"{_span(rows)}; no single row raises alone"


def _describe(row: Row) -> str:
    sample, completion = row
    text = completion.text if len(completion.text) <= 120 else completion.text[:117] + "..."
    return f"for the row {sample.source} and the completion {text!r}"


def _span(rows: Sequence[Row]) -> str:
    return f"for the rows {rows[0][0].source} to {rows[-1][0].source}"
