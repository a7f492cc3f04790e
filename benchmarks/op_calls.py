"""A case of an op: calls that do the same work, an oracle, and counts of the work."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from vlmr1_kernels import registry

Outputs = Mapping[str, Tensor]
FLOOR = "floor"


class Unavailable(Exception):
    """An arm cannot run here; the reason is reported in its place."""


@dataclass(frozen=True)
class Call:
    """One way to do the work: `run` makes fresh results under the names of the oracle's. `tolerance`: relative L2 error
    against the oracle."""

    run: Callable[[], Outputs]
    tolerance: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Problem:
    """One case, its inputs made. `flops`: of the fewest products; `moved`: bytes, each input read once and each result
    written once. `peers`: arms of other people's code, left out where they fail."""

    flops: int
    moved: int
    oracle: Callable[[], Outputs]
    arms: Mapping[str, Callable[[], Call]]
    peers: frozenset[str] = frozenset()


def failures() -> tuple[type[Exception], ...]:
    """Exceptions of kernels on a device or version that they do not support."""
    triton = (import_module("triton.errors").TritonError,) if find_spec("triton") else ()
    return (RuntimeError, ImportError, AttributeError, TypeError, ValueError, AssertionError, KeyError, *triton)


def ours(op: str, make: Callable[[str], Call]) -> dict[str, Callable[[], Call]]:
    """An arm for each implementation of an op; `make` gets the name for `impl=`."""
    return {name: lambda name=name: make(name) for name in registry.implementations(op)}


def copy_of(size: int, device: str) -> Callable[[], Call]:
    """The floor of an op that moves memory: a copy that reads and writes `size` bytes in all; zeros would be faster."""
    source = torch.randint(256, (size // 2,), dtype=torch.uint8, device=device)
    return lambda: Call(lambda: {"copy": source.clone()})


def product_of(flops: int, dtype: torch.dtype, device: str) -> Callable[[], Call]:
    """The floor of an op that computes: one product of square matrices with as many operations."""
    side = max(1, round((flops / 2) ** (1 / 3)))
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return lambda: Call(lambda: {"product": left @ right})
