"""Reward functions by name, users' functions by `module:function` or `file.py:function`, and reward models.

A reward function is `f(prompts, completions, **columns) -> list[float]`, as in TRL. `prompts` is a list of message
lists, `completions` a list of `[{"role": "assistant", "content": text}]`. Each column has one value a completion;
`solution` and `completion_ids` are among them. An attribute `check(sample)` raises DataError for a row that cannot be
scored; all rows are checked before training.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from vlmr1.errors import SettingError
from vlmr1.rewards.settings import DEFAULTS, RewardSettings
from vlmr1.types import Completion, Sample

logger = logging.getLogger(__name__)
Function = TypeVar("Function", bound=Callable[..., Any])
Check = Callable[..., None]
Isolated = Callable[[RewardSettings, str], bool]


@dataclass
class RewardContext:
    """Arguments that functions with TRL's signature may ask for: `trainer_state`, `log_extra` and `log_metric`."""

    trainer_state: Any = None
    metrics: dict[str, list[float]] = field(default_factory=dict)

    def arguments(self, function: Callable[..., Any], completions: Sequence[Completion]) -> dict[str, Any]:
        """Keyword arguments for a user's function, of those that it takes. `log_extra(column, values)` adds a column to
        the logged completions, `log_metric(name, value)` a metric to the logs."""
        if (getattr(function, "__module__", None) or "").startswith("vlmr1."):  # None in `exec`
            return {}
        every = {"trainer_state": self.trainer_state, "log_metric": self.log_metric}
        every["log_extra"] = partial(log_extra, completions)
        parameters = inspect.signature(function).parameters
        if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
            return every
        return {name: value for name, value in every.items() if name in parameters}

    def log_metric(self, name: str, value: float) -> None:
        self.metrics.setdefault(name, []).append(float(value))

    def take(self) -> dict[str, float]:
        """Return the mean of each metric, and forget them."""
        metrics, self.metrics = self.metrics, {}
        return {name: sum(values) / len(values) for name, values in metrics.items()}


def log_extra(completions: Sequence[Completion], column: str, values: Sequence[Any]) -> None:
    """Add a value to each completion's row of the log. ValueError: another number of values than completions."""
    if len(values) != len(completions):
        raise ValueError(f"log_extra({column!r}): {len(values)} values for {len(completions)} completions")
    for completion, value in zip(completions, values, strict=True):
        completion.logged[column] = value


@dataclass(frozen=True)
class Reward:
    """A reward function with its name and its check of a row.

    `spec` is "module:function" or "file.py:function", from which a worker imports the function; None keeps it in this
    process. `isolated(settings, accu_reward_method)` tells whether a row is scored in a worker with a time limit. Where
    it is None, the function's attribute `isolated` does.
    """

    name: str
    function: Callable[..., Any]
    check: Check | None = None
    spec: str | None = None
    settings: RewardSettings | None = None  # None where the function takes none
    isolated: Isolated | None = None
    images: bool = False  # whether it takes the columns image_size and image_grid_thw
    context: RewardContext | None = None  # arguments of the trainer, set by each call

    def __call__(self, /, prompts: list, completions: list, **columns: list) -> Any:
        return self.function(prompts=prompts, completions=completions, **columns, **self.options)

    @property
    def options(self) -> dict[str, RewardSettings]:
        """Further arguments of the function."""
        return {} if self.settings is None else {"settings": self.settings}


RewardSource = str | Reward | Callable[..., Any]
REWARDS: dict[str, Reward] = {}


def register(
    name: str,
    check: Check | None = None,
    *,
    with_settings: bool = False,
    isolated: Isolated | None = None,
    images: bool = False,
) -> Callable[[Function], Function]:
    """Return a decorator that registers a reward function as `name`.

    With `with_settings` the function and its check are called with `settings=RewardSettings`. `isolated`, `images`: see
    `Reward`.
    """

    def add(function: Function) -> Function:
        if name in REWARDS:
            raise ValueError(f"a reward called {name!r} is registered already")
        settings = DEFAULTS if with_settings else None
        REWARDS[name] = Reward(name, function, check, _spec(function), settings, isolated, images)
        return function

    return add


def get_reward(reward: RewardSource, settings: RewardSettings | None = None) -> Reward:
    """Return a reward by its name, by `module:function` or `file.py:function`, or wrap a plain function.

    `settings` are those of the run; without them a Reward keeps its own. SettingError for an unknown name lists the
    known ones.
    """
    found = _find(reward)
    if settings is None or found.settings is None:
        return found
    check = None if found.check is None else partial(getattr(found.check, "func", found.check), settings=settings)
    return replace(found, settings=settings, check=check)


def _find(reward: RewardSource) -> Reward:
    if isinstance(reward, Reward):
        return reward
    torch = sys.modules.get("torch")  # worker processes have no use for it
    if torch is not None and isinstance(reward, torch.nn.Module):
        from vlmr1.rewards.model import RewardModel

        return _wrap("", RewardModel(reward))
    if not isinstance(reward, str):
        return _wrap(getattr(reward, "__name__", type(reward).__name__), reward)
    if reward in REWARDS:
        return REWARDS[reward]
    if ":" in reward:
        return _load(reward)
    if "/" in reward or Path(reward, "config.json").is_file():
        from vlmr1.rewards.model import load_reward_model

        return _wrap("", load_reward_model(reward))
    near = get_close_matches(reward, REWARDS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise SettingError(
        f"reward_funcs: unknown reward {reward!r}{hint} Known: {', '.join(sorted(REWARDS))}, "
        "your own as module:function or file.py:function, or a reward model's directory or id"
    )


def check_samples(
    rewards: Iterable[RewardSource],
    samples: Sequence[Sample],
    settings: RewardSettings | None = None,
) -> None:
    """Run each reward's check over all rows; DataError for a row that cannot be scored."""
    for check in checks_of(rewards, settings):
        for sample in samples:
            check(sample)


def checks_of(rewards: Iterable[RewardSource], settings: RewardSettings | None = None) -> list[Check]:
    """Return the rewards' checks of a row."""
    return [reward.check for reward in (get_reward(each, settings) for each in rewards) if reward.check]


def resolve(spec: str) -> Callable[..., Any]:
    """Import the function of a Reward's `spec`."""
    where, _, attribute = spec.rpartition(":")
    return getattr(_load_module(where), attribute)


def _spec(function: Callable[..., Any]) -> str | None:
    """Return the `spec` of a function, or None where a worker cannot import it."""
    name, module = getattr(function, "__qualname__", "."), getattr(function, "__module__", "__main__")
    return None if "." in name or name == "<lambda>" or module == "__main__" else f"{module}:{name}"


def _wrap(name: str, function: Any, spec: str | None = None) -> Reward:
    if not callable(function):
        raise SettingError(f"reward_funcs: {name} is not a function but {type(function).__name__}")
    for known in REWARDS.values():
        if known.function is function:
            return known
    name = name or function.__name__
    if hasattr(function, "one_by_one"):
        logger.warning("reward %s: the attribute one_by_one is now called isolated; the old name still works", name)
    return Reward(name, function, getattr(function, "check", None), spec)


@cache
def _load(name: str) -> Reward:
    where, _, attribute = name.rpartition(":")
    try:
        module = _load_module(where)
    except (ImportError, SyntaxError, OSError, ValueError) as error:
        raise SettingError(f"reward_funcs: {name}: cannot import {where}: {error}") from error
    if not hasattr(module, attribute):
        raise SettingError(f"reward_funcs: {name}: {where} has no {attribute!r}")
    return _wrap(name, getattr(module, attribute), spec=name)


@cache
def _load_module(where: str) -> ModuleType:
    if not where.endswith(".py"):
        return importlib.import_module(where)
    path = Path(where)
    spec = importlib.util.spec_from_file_location(f"_vlmr1_reward_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look a class's module up
    spec.loader.exec_module(module)
    return module
