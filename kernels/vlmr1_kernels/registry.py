"""Selects the implementation of an op: by name, or by device, dtype, shape and options.

The `impl=` argument takes precedence over `with use(...)`, that over the environment variable
`VLMR1_KERNELS="op=impl,..."`, that over `auto`. A named implementation that does not support the call is an error;
only `auto` falls back to others.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from vlmr1_kernels.implementations import EXAMPLE_SHAPES, TABLE, Implementation, Request

logger = logging.getLogger("vlmr1_kernels")

ENVIRONMENT_VARIABLE = "VLMR1_KERNELS"
AUTO = "auto"


class ImplementationError(ValueError):
    """Unknown op or implementation, or a named implementation that does not support the call."""


@dataclass(frozen=True)
class Explanation:
    """Implementation that `auto` selects for a request, and why it does not select the others."""

    op: str
    chosen: str
    others: dict[str, str]


class _Overrides(threading.local):
    """Choices of the blocks that this thread is in; torch.compile cannot trace a ContextVar."""

    choices: Mapping[str, str] = MappingProxyType({})


_overrides = _Overrides()
_loaded: dict[str, Callable[..., Any]] = {}
_logged: set[tuple[str, str, torch.dtype, str]] = set()


def ops() -> tuple[str, ...]:
    """Return the names of all ops."""
    return tuple(TABLE)


def implementations(op: str) -> Mapping[str, Implementation]:
    """Return the implementations of an op by name, in the order in which `auto` prefers them."""
    if op not in TABLE:
        raise ImplementationError(f"unknown op {op!r}; known: {', '.join(TABLE)}")
    return TABLE[op]


@lru_cache(maxsize=64)
def parse_choices(text: str) -> Mapping[str, str]:
    """Parse `"op=impl,op=impl"`, the format of `VLMR1_KERNELS`, `use` and the `--kernels` flag.

    ImplementationError for a malformed item, an unknown op or an unknown implementation.
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
    """Return the choices; ImplementationError for an unknown op or implementation."""
    for op, impl in choices.items():
        known = implementations(op)
        if impl != AUTO and impl not in known:
            raise ImplementationError(f"{op} has no implementation {impl!r}; known: {', '.join((AUTO, *known))}")
    return choices


@contextmanager
def use(choices: str = "", /, **by_op: str) -> Iterator[None]:
    """Context manager that selects implementations: `use("op=impl,...")` or `use(op="impl")`.

    Inner blocks take precedence; `op=auto` restores automatic selection.
    """
    before = _overrides.choices
    _overrides.choices = {**before, **parse_choices(choices), **check_choices(by_op)}
    try:
        yield
    finally:
        _overrides.choices = before


def resolve(op: str, impl: str, request: Request) -> Callable[..., Any]:
    """Return the function of the selected implementation; ImplementationError if none supports the request."""
    return _load(select(op, request, impl).target)


def implementation_for(
    op: str, impl: str, tensor: Tensor, *shape: int, options: frozenset[str] = frozenset()
) -> Callable[..., Any]:
    """Return `resolve` for a call with this tensor and shape; what is returned runs without autocast."""
    run = resolve(op, impl, Request(tensor.device, tensor.dtype, shape, options))
    if tensor.device.type == "meta" or not torch.is_autocast_enabled(tensor.device.type):
        return run

    def without_autocast(*args: Any, **options: Any) -> Any:
        # Ops compute in the dtype of their tensors; autocast would cast the operands of their GEMMs.
        with torch.autocast(tensor.device.type, enabled=False):
            return run(*args, **options)

    return without_autocast


def select(op: str, request: Request, impl: str = AUTO) -> Implementation:
    """Return the selected implementation; ImplementationError if none supports the request."""
    if impl == AUTO:
        text = os.environ.get(ENVIRONMENT_VARIABLE)
        impl = _overrides.choices.get(op) or (parse_choices(text).get(op, AUTO) if text else AUTO)
    if impl == AUTO:
        selected = _select_auto(op, request)
        _log_selection(op, request, selected.name)
        return selected
    check_choices({op: impl})
    named = implementations(op)[impl]
    reason = named.unsupported_reason(request)
    if reason is not None:
        raise ImplementationError(f"{op}: implementation {impl!r} does not support this call: {reason}")
    return named


def explain(op: str, request: Request) -> Explanation:
    """Return what `auto` selects for the request, and why not each of the others."""
    chosen = _select_auto(op, request).name
    others = {
        name: implementation.unsupported_reason(request)
        or f"usable by name; {implementation.explicit_only(request) or f'auto prefers {chosen}'}"
        for name, implementation in implementations(op).items()
        if name != chosen
    }
    return Explanation(op, chosen, others)


def explain_all(device: torch.device | str, dtype: torch.dtype) -> list[Explanation]:
    """Return `explain` of every op at an example shape, for `vlmr1 doctor`."""
    return [explain(op, Request(torch.device(device), dtype, EXAMPLE_SHAPES[op])) for op in ops()]


def _select_auto(op: str, request: Request) -> Implementation:
    reasons = []
    for implementation in implementations(op).values():
        reason = implementation.unsupported_reason(request) or implementation.explicit_only(request)
        if reason is None:
            return implementation
        reasons.append(f"{implementation.name}: {reason}")
    raise ImplementationError(f"{op}: no implementation supports {request}; " + "; ".join(reasons))


def _log_selection(op: str, request: Request, name: str) -> None:
    key = (op, request.device.type, request.dtype, name)
    if key not in _logged and not torch.compiler.is_compiling():
        _logged.add(key)
        logger.info("%s on %s in %s: %s", op, request.device.type, request.dtype, name)


def _load(target: str) -> Callable[..., Any]:
    if target not in _loaded:  # not functools.cache, which torch.compile would trace through, to the import
        module, function = target.split(":")
        _loaded[target] = getattr(import_module(module), function)
    return _loaded[target]
