"""Score the groups of a step: call each reward function, here or in the worker pool."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from inspect import iscoroutinefunction
from itertools import islice, repeat
from typing import Any

import numpy as np
import torch

from vlmr1.data.boxes import Scale
from vlmr1.data.images import upright_size
from vlmr1.errors import RewardError, UserError
from vlmr1.rewards.calls import Finished, awaited, run_together
from vlmr1.rewards.judge import JudgeError
from vlmr1.rewards.methods import METHOD, converts, method_of
from vlmr1.rewards.pool import Outcome, RewardPool, WorkerDied
from vlmr1.rewards.registry import Reward, RewardContext, get_reward
from vlmr1.rewards.watch import log_print, watched
from vlmr1.types import Completion, Group, Prompt

logger = logging.getLogger(__name__)
FOR_THE_USER = (UserError, JudgeError)  # exceptions that say what to mend
FLOAT32_MAX = torch.finfo(torch.float32).max
NUMBER = (int, float, np.integer, np.floating, np.bool_)


@dataclass(frozen=True)
class TimedOut:
    """A completion whose score is 0 because the reward did not end within the time limit, or raised an exception."""

    reward: str
    source: str  # file:line of the row
    group: int  # place in the groups that were scored
    completion: int  # place in its group
    raised: bool = False


def failure_counts(zeros: Sequence[TimedOut]) -> dict[str, float]:
    """Return the metrics `reward_timeouts`, and `reward_errors` where there are some."""
    errors = sum(each.raised for each in zeros)
    return {"reward_timeouts": float(len(zeros) - errors)} | ({"reward_errors": float(errors)} if errors else {})


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
    working: set[str] | None = None,
    context: RewardContext | None = None,
) -> list[Group]:
    """Return the groups with their rewards [G, R] float32, one column a reward function; NaN where it returned None.

    Without a pool each function is called once, for all completions, in this process. With a pool, isolated rewards are
    called for one completion at a time in a worker process, within the pool's time limit. Isolated are built-in rewards
    that may be slow, and functions from a module or file with `function.isolated = True`. A completion that exceeds the
    limit scores 0 and is added to `timed_out`. Functions that are `async` run at the same time, in this process.
    With a `context` users' functions get TRL's arguments of the trainer too.

    What a function prints is logged with its name and the row, or the rows of its batch; so is a call that takes long.
    With `working`, the names of the functions that have scored before, a completion for which a function raises scores
    0, is logged, and is added to `timed_out`. A function that raises for all of a call and has not worked before is an
    error, and so is every exception that tells the user what to mend (UserError, JudgeError).

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
    zeros: list[TimedOut] = []
    rewards = [replace(get_reward(reward), context=context) for reward in reward_functions]
    rewards = _with_async_called(rewards, rows)
    columns = [_best(reward, rows, pool, zeros, working) for reward in rewards]  # R lists of B
    if timed_out is not None:
        timed_out += zeros
    scores = torch.tensor(columns, dtype=torch.float32).reshape(len(columns), len(rows)).T  # [B, R]
    parts = scores.split([len(group.completions) for group in groups])
    return [replace(group, rewards=part.contiguous()) for group, part in zip(groups, parts, strict=True)]


def _with_async_called(rewards: Sequence[Reward], rows: Sequence[_Row]) -> list[Reward]:
    """Return the rewards; where several are `async`, they have been called, at the same time."""
    found = [reward for reward in rewards if iscoroutinefunction(reward.function)]
    if len(found) < 2:
        return list(rewards)
    with watched(", ".join(reward.name for reward in found), _span(rows)):
        outcomes = run_together([_invoke(reward, rows) for reward in found])
    done = {id(reward): outcome for reward, outcome in zip(found, outcomes, strict=True)}
    called = (replace(each, function=Finished(each.function, done[id(each)])) for each in found)
    return [next(called) if id(reward) in done else reward for reward in rewards]


def _invoke(reward: Reward, rows: Sequence[_Row]) -> Any:
    told = {}
    if reward.context is not None:
        told = reward.context.arguments(reward.function, [row.completion for row in rows])
    return reward(**told | _arguments(reward, rows))


def _best(reward: Reward, rows: Sequence[_Row], *options: Any) -> list[float]:
    """Return one reward's B scores. A built-in reward is called for each accepted solution; the best score counts.

    `options` are further arguments of `_call`."""
    if reward.settings is None:
        return _call(reward, rows, *options)
    each = [row.prompt.sample.each_solution() for row in rows]
    every = [
        row if sample is row.prompt.sample else replace(row, prompt=replace(row.prompt, sample=sample))
        for row, samples in zip(rows, each, strict=True)
        for sample in samples
    ]
    values = iter(_call(reward, every, *options))
    return [max(islice(values, len(samples))) for samples in each]


def _call(
    reward: Reward, rows: Sequence[_Row], pool: RewardPool | None, zeros: list[TimedOut], working: set[str] | None
) -> list[float]:
    """Return one reward's B scores; `zeros` gets the completions that it could not score."""
    apart = [] if pool is None else [i for i, row in enumerate(rows) if _goes_to_pool(reward, row)]
    together = sorted(set(range(len(rows))) - set(apart))
    results: dict[int, float | Outcome] = {}
    if together:
        here = [rows[i] for i in together]
        results |= zip(together, _call_here(reward, here, tolerant=working is not None), strict=True)
    if apart and pool is not None:
        there = [rows[i] for i in apart]
        results |= zip(apart, map(_value, _run(reward, there, pool), there, repeat(reward)), strict=True)
    failed = {i: each for i, each in results.items() if isinstance(each, Outcome)}
    errors = [i for i, each in failed.items() if each.kind == "error"]
    if errors and (working is None or (len(errors) == len(rows) and reward.name not in working)):
        raise _raised(reward, failed[errors[0]].value, _describe(rows[errors[0]]))
    if working is not None and len(errors) < len(rows):
        working.add(reward.name)
    for i, outcome in sorted(failed.items()):
        row, is_error = rows[i], outcome.kind == "error"
        limit = 0.0 if pool is None else pool.timeout
        what = f"raised {outcome.value!r}" if is_error else f"was not done in {limit:g} s"
        logger.warning("reward %s %s %s: its score is 0", reward.name, what, _describe(row))
        zeros.append(TimedOut(reward.name, row.prompt.sample.source, row.group, row.place, is_error))
    scores = [results[i] for i in range(len(rows))]
    return [0.0 if isinstance(each, Outcome) else each for each in scores]


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
        tasks = [(spec, _arguments(reward, [row]) | reward.options) for row in rows]
        return pool.run(tasks, lambda index, line: log_print(reward.name, _describe(rows[index]), line))
    except WorkerDied as error:
        raise RewardError(f"reward {reward.name}: {error} {_describe(rows[error.index])}") from error


def _value(outcome: Outcome, row: _Row, reward: Reward) -> float | Outcome:
    """Return the score of a worker's outcome, or the outcome where it has none."""
    if isinstance(outcome.value, FOR_THE_USER):
        raise _raised(reward, outcome.value, _describe(row))
    return _numbers(outcome.value, reward, [row])[0] if outcome.kind == "value" else outcome


def _call_here(reward: Reward, rows: Sequence[_Row], *, tolerant: bool) -> Sequence[float | Outcome]:
    """Return the scores of a batch. Where `tolerant`, after an exception the function is called for each row alone."""
    try:
        return _called(reward, rows)
    except RewardError:
        raise
    except Exception as error:  # user code may raise anything
        if not tolerant or isinstance(error, FOR_THE_USER):
            raise _raised(reward, error, _blame(reward, rows, error)) from error
        outcomes = [_outcome(reward, row) for row in rows]
        if not any(isinstance(each, Outcome) for each in outcomes):
            raise _raised(reward, error, f"{_span(rows)}; no single row raises alone") from error
        return outcomes


def _outcome(reward: Reward, row: _Row) -> float | Outcome:
    """Return the score of one row, or the exception that the function raises for it."""
    try:
        return _called(reward, [row])[0]
    except RewardError:
        raise
    except Exception as error:  # user code may raise anything
        if isinstance(error, FOR_THE_USER):
            raise _raised(reward, error, _describe(row)) from error
        return Outcome("error", error)


def _called(reward: Reward, rows: Sequence[_Row]) -> list[float]:
    where = _describe(rows[0]) if len(rows) == 1 else _span(rows)
    with watched(reward.name, where):
        values = awaited(_invoke(reward, rows))
    return _numbers(values, reward, rows)


def _raised(reward: Reward, error: BaseException, where: str) -> RewardError:
    """Return the error for an exception of a reward function, which it has as its cause."""
    raised = RewardError(f"reward {reward.name}: raised {error!r} {where}")
    raised.__cause__ = error
    return raised


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
    given = [{} if reward.settings is not None else sample.as_given for sample in samples]
    shared = set.intersection(*(set(sample.columns) for sample in samples))
    arguments = {name: [sample.columns[name] for sample in samples] for name in sorted(shared)}
    if any(METHOD in sample.columns for sample in samples):
        arguments[METHOD] = [sample.columns.get(METHOD) for sample in samples]
    if reward.images:
        arguments = _image_columns(rows) | arguments
    if reward.settings is not None:
        arguments["box_scale"] = [_box_scale(reward, row) for row in rows]
        arguments["think_opening"] = [row.prompt.think_opening for row in rows]
    arguments |= {
        "prompts": [sample.messages for sample in samples],
        "completions": [[{"role": "assistant", "content": row.completion.text}] for row in rows],
        "completion_ids": [row.completion.token_ids.tolist() for row in rows],
        "solution": [
            [sample.solution, *sample.other_solutions] if sample.other_solutions else sample.solution
            for sample in samples
        ],
        **{name: [each.get(name) for each in given] for name in given[0]},
    }
    if given[0] and "solution" not in given[0]:  # rows from Python have the columns that they have
        del arguments["solution"]
    return arguments


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
            _called(reward, [row])
        except Exception:  # user code; the first exception is the chained one
            return _describe(row)
    return f"{_span(rows)}; no single row raises alone"


def _describe(row: _Row) -> str:
    text = row.completion.text
    text = text if len(text) <= 120 else text[:117] + "..."
    return f"for the row {row.prompt.sample.source} and the completion {text!r}"


def _span(rows: Sequence[_Row]) -> str:
    return f"for the rows {rows[0].prompt.sample.source} to {rows[-1].prompt.sample.source}"
