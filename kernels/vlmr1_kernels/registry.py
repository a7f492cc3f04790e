"""Which implementation of an op runs: asked for by name, or chosen from device, dtype, shape and options.

Order of authority: the `impl=` argument of the call, `with use(...)`, the environment variable
`VLMR1_KERNELS="op=impl,..."`, then `auto`. An implementation that was named is used or refused with the
reason; only `auto` looks further.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

logger = logging.getLogger("vlmr1_kernels")

ENVIRONMENT_VARIABLE = "VLMR1_KERNELS"
AUTO = "auto"


class ImplementationError(ValueError):
    """An op or implementation does not exist, or the named implementation refuses this call."""


class Request(NamedTuple):
    """All that `auto` may look at: device, dtype, shape and the options asked for.

    The meaning of `shape` is the op's own, see `implementations.py`. `options` are the names of those arguments
    of the call that not every implementation serves.
    """

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]
    options: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Implementation:
    """One way to run one op. `target` ("module:function") is imported when it is first used;
    `refusal` says why a request cannot be served, or None when it can; `reserve` why it is served by name only."""

    op: str
    name: str
    target: str
    refusal: Callable[[Request], str | None]
    reserve: Callable[[Request], str | None] = lambda request: None


@dataclass(frozen=True)
class Explanation:
    """What `auto` picks for a request, and why not each of the others."""

    op: str
    chosen: str
    others: dict[str, str]


_overrides: ContextVar[Mapping[str, str]] = ContextVar("vlmr1_kernels_overrides", default=MappingProxyType({}))
_loaded: dict[str, Callable[..., Any]] = {}
_announced: set[tuple[str, str, torch.dtype, str]] = set()


def _table() -> Mapping[str, Mapping[str, Implementation]]:
    from vlmr1_kernels.implementations import TABLE

    return TABLE


def ops() -> tuple[str, ...]:
    """The names of all ops."""
    return tuple(_table())


def implementations(op: str) -> Mapping[str, Implementation]:
    """The implementations of an op by name, in the order in which `auto` prefers them."""
    table = _table()
    if op not in table:
        raise ImplementationError(f"unknown op {op!r}; known: {', '.join(table)}")
    return table[op]


@lru_cache(maxsize=64)
def parse_choices(text: str) -> Mapping[str, str]:
    """`"op=impl,op=impl"` -> {op: impl}; serves `VLMR1_KERNELS`, `use` and the `--kernels` flag.

    Raises ImplementationError on a malformed item, an unknown op or an unknown implementation.
    """
    choices: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        op, equals, impl = (part.strip() for part in item.partition("="))
        if not equals or not op or not impl:
            raise ImplementationError(f"cannot read {item!r}: expected op=impl[,op=impl...]")
        if op in choices and choices[op] != impl:
            raise ImplementationError(f"{op} is given twice: {choices[op]} and {impl}")
        choices[op] = impl
    return check_choices(choices)


def check_choices(choices: Mapping[str, str]) -> Mapping[str, str]:
    """The choices as they came; raises ImplementationError where an op or implementation is unknown."""
    for op, impl in choices.items():
        known = implementations(op)
        if impl != AUTO and impl not in known:
            raise ImplementationError(f"{op} has no implementation {impl!r}; known: {', '.join((AUTO, *known))}")
    return choices


@contextmanager
def use(choices: str = "", /, **by_op: str) -> Iterator[None]:
    """Fix implementations inside a `with` block: `use("op=impl,...")` or `use(op="impl")`.

    Blocks nest, the innermost choice of an op counts; `op=auto` gives the choice back to `auto`.
    """
    merged = {**_overrides.get(), **parse_choices(choices), **check_choices(by_op)}
    token = _overrides.set(merged)
    try:
        yield
    finally:
        _overrides.reset(token)


def resolve(op: str, impl: str, request: Request) -> Callable[..., Any]:
    """The function that serves a call of `op`; raises ImplementationError where there is none."""
    return _load(chosen(op, request, impl).target)


def chosen(op: str, request: Request, impl: str = AUTO) -> Implementation:
    """The implementation that serves a call of `op`; raises ImplementationError where there is none."""
    if impl == AUTO:
        overrides = _overrides.get()
        environment = parse_choices(os.environ.get(ENVIRONMENT_VARIABLE, ""))
        impl = overrides.get(op) or environment.get(op, AUTO)
    if impl == AUTO:
        found = _choose(op, request)
        _announce(op, request, found.name)
        return found
    check_choices({op: impl})
    named = implementations(op)[impl]
    reason = named.refusal(request)
    if reason is not None:
        raise ImplementationError(f"{op}: implementation {impl!r} refuses: {reason}")
    return named


def explain(op: str, request: Request) -> Explanation:
    """For `vlmr1 doctor`: what `auto` picks for the request, and why not each of the others."""
    chosen = _choose(op, request).name
    others = {
        name: implementation.refusal(request)
        or f"usable by name; {implementation.reserve(request) or f'auto prefers {chosen}'}"
        for name, implementation in implementations(op).items()
        if name != chosen
    }
    return Explanation(op, chosen, others)


def doctor(device: torch.device | str, dtype: torch.dtype) -> list[Explanation]:
    """`explain` for every op, at an example shape of each."""
    from vlmr1_kernels.implementations import EXAMPLE_SHAPES

    return [explain(op, Request(torch.device(device), dtype, EXAMPLE_SHAPES[op])) for op in ops()]


def _choose(op: str, request: Request) -> Implementation:
    reasons = []
    for implementation in implementations(op).values():
        reason = implementation.refusal(request) or implementation.reserve(request)
        if reason is None:
            return implementation
        reasons.append(f"{implementation.name}: {reason}")
    raise ImplementationError(f"{op}: no implementation serves {request}; " + "; ".join(reasons))


def _announce(op: str, request: Request, name: str) -> None:
    key = (op, request.device.type, request.dtype, name)
    if key not in _announced:
        _announced.add(key)
        logger.info("%s on %s in %s: %s", op, request.device.type, request.dtype, name)


def _load(target: str) -> Callable[..., Any]:
    if target not in _loaded:  # a dict, because torch.compile looks through functools.cache, and stops at the import
        module, function = target.split(":")
        _loaded[target] = getattr(import_module(module), function)
    return _loaded[target]
