"""Reward functions by name, and the user's own by `module:function` or `file.py:function`.

A reward function is `f(prompts, completions, **columns) -> list[float]`, as in TRL: `prompts` a list of
message lists, `completions` a list of `[{"role": "assistant", "content": text}]`, and of each column,
`solution` and `completion_ids` among them, one value a completion. It may have a `check(sample)` that raises
DataError for a row that it cannot score; all rows are checked before training.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from vlmr1.errors import SettingError
from vlmr1.types import Sample

Function = TypeVar("Function", bound=Callable[..., Any])
Check = Callable[[Sample], None]


@dataclass(frozen=True)
class Reward:
    """A reward function with its name and its check of a row."""

    name: str
    function: Callable[..., Any]
    check: Check | None = None

    def __call__(self, /, prompts: list, completions: list, **columns: list) -> Any:
        return self.function(prompts=prompts, completions=completions, **columns)


REWARDS: dict[str, Reward] = {}


def register(name: str, check: Check | None = None) -> Callable[[Function], Function]:
    """Decorator: makes a reward function known by `name`."""

    def add(function: Function) -> Function:
        if name in REWARDS:
            raise ValueError(f"a reward called {name!r} is registered already")
        REWARDS[name] = Reward(name, function, check)
        return function

    return add


def get_reward(reward: str | Reward | Callable[..., Any]) -> Reward:
    """A reward by its name, by `module:function` or `file.py:function`, or a plain function.

    Raises SettingError for an unknown name, with the known ones and the nearest of them.
    """
    if isinstance(reward, Reward):
        return reward
    if not isinstance(reward, str):
        return _wrap(getattr(reward, "__name__", type(reward).__name__), reward)
    if reward in REWARDS:
        return REWARDS[reward]
    if ":" in reward:
        return _load(reward)
    near = get_close_matches(reward, REWARDS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise SettingError(
        f"reward_funcs: unknown reward {reward!r}{hint} Known: {', '.join(sorted(REWARDS))}, "
        "or your own as module:function or file.py:function"
    )


def check_samples(rewards: Iterable[str | Reward | Callable[..., Any]], samples: Sequence[Sample]) -> None:
    """Runs each reward's check over all rows; a row that cannot be scored raises its DataError."""
    for check in [reward.check for reward in map(get_reward, rewards) if reward.check]:
        for sample in samples:
            check(sample)


def _wrap(name: str, function: Any) -> Reward:
    if not callable(function):
        raise SettingError(f"reward_funcs: {name} is not a function but {type(function).__name__}")
    for known in REWARDS.values():
        if known.function is function:
            return known
    return Reward(name, function, getattr(function, "check", None))


@cache
def _load(name: str) -> Reward:
    where, _, attribute = name.rpartition(":")
    try:
        module = _load_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except (ImportError, SyntaxError, OSError, ValueError) as error:
        raise SettingError(f"reward_funcs: {name}: cannot import {where}: {error}") from error
    if not hasattr(module, attribute):
        raise SettingError(f"reward_funcs: {name}: {where} has no {attribute!r}")
    return _wrap(name, getattr(module, attribute))


def _load_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"_vlmr1_reward_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look a class's module up
    spec.loader.exec_module(module)
    return module
