"""Score the groups of a step: call each reward function, here or in the worker pool."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from vlmr1.data.boxes import Scale
from vlmr1.data.images import upright_size
from vlmr1.errors import RewardError
from vlmr1.rewards.methods import METHOD, converts, method_of
from vlmr1.rewards.pool import Outcome, RewardPool, WorkerDied
from vlmr1.rewards.registry import Reward, get_reward
from vlmr1.types import Completion, Group, Prompt

FLOAT32_MAX = torch.finfo(torch.float32).max
NUMBER = (int, float, np.integer, np.floating, np.bool_)


@dataclass(frozen=True)
class TimedOut:
    """A completion that a reward did not score within the time limit, so its score is 0."""

    reward: str
    source: str  # file:line of the row
    group: int  # place in the groups that were scored
    completion: int  # place in its group


@dataclass(frozen=True)
class _Row:
    prompt: Prompt
    completion: Completion
    group: int
    place: int


def score_groups(
    groups: Sequence[Group],
    reward_functions: Sequence[str | Reward | Callable],
    *,
    pool: RewardPool | None = None,
    timed_out: list[TimedOut] | None = None,
) -> list[Group]:
    """Return the groups with their rewards [G, R] float32, one column a reward function; NaN where it returned None.

    Without a pool each function is called once, for all completions, in this process. With a pool, isolated rewards are
    called for one completion at a time in a worker process, within the pool's time limit. Isolated are built-in rewards
    that may be slow, and functions from a module or file with `function.isolated = True`. A completion that exceeds the
    limit scores 0 and is added to `timed_out`.

    RewardError names the function and the row: it raised, returned a wrong number of values or one that is not a finite
    number, or its process died.
    """
    rows = [
        _Row(group.prompt, completion, g, i)
        for g, group in enumerate(groups)
        for i, completion in enumerate(group.completions)
    ]
    if not rows:
        return list(groups)
    columns = [_call(get_reward(reward), rows, pool, timed_out) for reward in reward_functions]  # R lists of B
    rewards = torch.tensor(columns, dtype=torch.float32).reshape(len(columns), len(rows)).T  # [B, R]
    parts = rewards.split([len(group.completions) for group in groups])
    return [replace(group, rewards=part.contiguous()) for group, part in zip(groups, parts, strict=True)]


def _call(
    reward: Reward, rows: Sequence[_Row], pool: RewardPool | None, timed_out: list[TimedOut] | None
) -> list[float]:
    """Return one reward's B scores."""
    apart = [] if pool is None else [i for i, row in enumerate(rows) if _goes_to_pool(reward, row)]
    together = sorted(set(range(len(rows))) - set(apart))
    values: dict[int, float] = {}
    if together:
        here = [rows[i] for i in together]
        values |= zip(together, _call_here(reward, here), strict=True)
    if apart and pool is not None:
        there = [rows[i] for i in apart]
        outcomes = _run(reward, there, pool)
        values |= zip(
            apart, (_value(outcome, reward, row) for outcome, row in zip(outcomes, there, strict=True)), strict=True
        )
        late = [row for outcome, row in zip(outcomes, there, strict=True) if outcome.kind == "timeout"]
        if timed_out is not None:
            timed_out += [TimedOut(reward.name, row.prompt.sample.source, row.group, row.place) for row in late]
    return [values[i] for i in range(len(rows))]


def _goes_to_pool(reward: Reward, row: _Row) -> bool:
    if reward.spec is None:
        return False
    if reward.isolated is None or reward.settings is None:
        old = getattr(reward.function, "one_by_one", False)  # the attribute's former name
        return getattr(reward.function, "isolated", old)
    method = method_of(row.prompt.sample, reward.settings)
    return reward.isolated(reward.settings, method)


def _run(reward: Reward, rows: Sequence[_Row], pool: RewardPool) -> list[Outcome]:
    spec = reward.spec
    assert spec is not None
    try:
        return pool.run([(spec, _arguments(reward, [row]) | reward.options) for row in rows])
    except WorkerDied as error:
        raise RewardError(f"reward {reward.name}: {error} {_describe(rows[error.index])}") from error


def _value(outcome: Outcome, reward: Reward, row: _Row) -> float:
    if outcome.kind == "timeout":
        return 0.0
    if outcome.kind == "error":
        raise RewardError(f"reward {reward.name}: raised {outcome.value!r} {_describe(row)}") from outcome.value
    return _numbers(outcome.value, reward, [row])[0]


def _call_here(reward: Reward, rows: Sequence[_Row]) -> list[float]:
    try:
        values = reward(**_arguments(reward, rows))
    except Exception as error:  # user code may raise anything
        raise RewardError(f"reward {reward.name}: raised {error!r} {_blame(reward, rows, error)}") from error
    return _numbers(values, reward, rows)


def _numbers(values: Any, reward: Reward, rows: Sequence[_Row]) -> list[float]:
    """Convert a function's return value for the rows to floats."""
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


def _arguments(reward: Reward, rows: Sequence[_Row]) -> dict[str, list[Any]]:
    """Arguments of a reward function, B values each. A column that some rows lack is left out, except the method."""
    samples = [row.prompt.sample for row in rows]
    shared = set.intersection(*(set(sample.columns) for sample in samples))
    arguments = {name: [sample.columns[name] for sample in samples] for name in sorted(shared)}
    if any(METHOD in sample.columns for sample in samples):
        arguments[METHOD] = [sample.columns.get(METHOD) for sample in samples]
    if reward.images:
        arguments = _image_columns(rows) | arguments
    if reward.settings is not None:
        arguments["box_scale"] = [_box_scale(reward, row) for row in rows]
    return arguments | {
        "prompts": [sample.messages for sample in samples],
        "completions": [[{"role": "assistant", "content": row.completion.text}] for row in rows],
        "completion_ids": [row.completion.token_ids.tolist() for row in rows],
        "solution": [sample.solution for sample in samples],
    }


def _image_columns(rows: Sequence[_Row]) -> dict[str, list[Any]]:
    """Size in px of each row's first image, and its patch grid; None where there is none."""
    grids = [row.prompt.images[0].get("image_grid_thw") if row.prompt.images else None for row in rows]
    samples = [row.prompt.sample for row in rows]
    return {
        "image_size": [upright_size(each.images[0], each.source) if each.images else None for each in samples],
        "image_grid_thw": [None if grid is None else grid.reshape(-1).tolist() for grid in grids],
    }


def _box_scale(reward: Reward, row: _Row) -> Scale | None:
    """The factors from the model's boxes to px of the file, where this reward reads boxes of this row."""
    settings = reward.settings
    assert settings is not None
    method = method_of(row.prompt.sample, settings)
    return settings.boxes.scale(row.prompt) if converts(reward.name, method) else None


def _number(value: object, reward: Reward, row: _Row) -> float:
    if value is None:  # the function does not apply to this row
        return math.nan
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if not isinstance(value, NUMBER) or not abs(value) <= FLOAT32_MAX:  # NaN compares false
        raise RewardError(f"reward {reward.name}: returned {value!r}, not a finite number, {_describe(row)}")
    return float(value)


def _blame(reward: Reward, rows: Sequence[_Row], error: Exception) -> str:
    """Describe the row that made the function raise: the error's `index`, or the first row that raises alone."""
    index = getattr(error, "index", None)
    if isinstance(index, int) and index < len(rows):
        return _describe(rows[index])
    for row in rows:
        try:
            reward(**_arguments(reward, [row]))
        except Exception:  # user code; the first exception is the chained one
            return _describe(row)
    return f"{_span(rows)}; no single row raises alone"


def _describe(row: _Row) -> str:
    text = row.completion.text
    text = text if len(text) <= 120 else text[:117] + "..."
    return f"for the row {row.prompt.sample.source} and the completion {text!r}"


def _span(rows: Sequence[_Row]) -> str:
    return f"for the rows {rows[0].prompt.sample.source} to {rows[-1].prompt.sample.source}"
