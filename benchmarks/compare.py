"""One case of an op: its arms must agree, then they are timed in turn and their memory is measured.

Memory is the peak of one call beyond what was held before it and beyond the results it returns (loss and
gradients). On a GPU that is what torch's allocator counts, after a warm-up call. On a CPU it is the resident
set (`harness.PeakMemory`) of a process of its own, which made the inputs and called the arm on a tiny case
first, so that libraries are loaded; large blocks are mapped one by one there (MALLOC_MMAP_THRESHOLD_), so that
none is served from memory that an earlier call left behind.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.device import Ceilings, clock, free_bytes
from benchmarks.harness import MIB, CheckFailed, PeakMemory, alternate, ratio
from vlmr1_kernels import ImplementationError
from vlmr1_kernels.testing import relative_error

Outputs = Mapping[str, Tensor]
FLOOR, EAGER = "floor", "eager"


class Unavailable(Exception):
    """An arm cannot run here; the reason is reported in its place."""


@dataclass(frozen=True)
class Arm:
    """One way to do the work. `run` makes fresh results under the names of the oracle's."""

    run: Callable[[], Outputs]
    tolerance: float = 0.0  # relative L2 error against the oracle; the floor, which computes nothing, has none
    note: str = ""
    peer: bool = False  # other people's code: where it fails or errs it is left out, with the reason
    needs: int = 0  # bytes that it is known to hold at once
    compiled: bool = False  # for its shapes, so that memory needs a warm-up at them


class Problem(Protocol):
    """One case of an op. The arms `floor` and `eager` exist always."""

    device: str
    dtype: torch.dtype
    flops: int  # of the fewest products
    moved: int  # bytes: each input read once, each result written once
    accumulator: int  # bytes of a float32 accumulator that bf16 gradients need, 0 where none

    def arms(self) -> Mapping[str, Callable[[], Arm]]: ...

    def oracle(self) -> Outputs: ...

    def tiny(self) -> Problem:
        """The same at a few rows, to load what an arm needs."""
        ...


def implementations_of(op: str, make: Callable[[str], Arm]) -> dict[str, Callable[[], Arm]]:
    """An arm for each implementation in the table; `make` receives the name for `impl=`."""
    from vlmr1_kernels.registry import implementations

    return {name: lambda name=name: make(name) for name in implementations(op)}


def build(problem: Problem, name: str) -> Arm:
    """The arm, ready to run; Unavailable says why there is none."""
    makers = problem.arms()
    if name not in makers:
        raise ValueError(f"arm is {name!r}; known: {', '.join(makers)}")
    try:
        arm = makers[name]()
    except ImportError as error:
        raise Unavailable(f"cannot be imported: {error}") from None
    available = free_bytes(problem.device)
    if arm.needs > available:
        raise Unavailable(f"needs {arm.needs / MIB:.0f} MiB, {available / MIB:.0f} MiB are free")
    return arm


def checked(
    problem: Problem, names: Sequence[str], oracle: Outputs
) -> tuple[dict[str, Arm], dict[str, dict[str, float]], dict[str, str]]:
    """(arms that agree with the oracle, their errors, reasons of those left out).

    CheckFailed where an arm that is not a peer disagrees."""
    arms: dict[str, Arm] = {}
    errors: dict[str, dict[str, float]] = {}
    skipped: dict[str, str] = {}
    for name in names:
        try:
            arm = build(problem, name)
            errors[name] = agreement(name, arm, _first_call(arm), oracle) if name != FLOOR else {}
            arms[name] = arm
        except Unavailable as error:
            skipped[name] = str(error)
    return arms, errors, skipped


def agreement(name: str, arm: Arm, outputs: Outputs, oracle: Outputs) -> dict[str, float]:
    """The error of each result; CheckFailed, or for a peer Unavailable, where one exceeds the tolerance."""
    if outputs.keys() != oracle.keys():
        raise CheckFailed(f"{name} returns {sorted(outputs)}, the oracle {sorted(oracle)}")
    errors = {each: relative_error(value, oracle[each]) for each, value in outputs.items()}
    wrong = [f"{each} errs by {error:.1e}" for each, error in errors.items() if not error <= arm.tolerance]
    if wrong:
        message = f"{name}: {', '.join(wrong)}, more than {arm.tolerance:.0e}: not timed"
        raise Unavailable(message) if arm.peer else CheckFailed(message)
    return errors


def _first_call(arm: Arm) -> Outputs:
    try:
        return arm.run()
    except ImplementationError as error:
        raise Unavailable(str(error)) from None
    except _peer_failures() as error:
        if not arm.peer:
            raise
        raise Unavailable(f"fails: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}") from error


def _peer_failures() -> tuple[type[Exception], ...]:
    """What other people's kernels raise on a device or version that they do not know."""
    known = (RuntimeError, ImportError, AttributeError, TypeError, ValueError, AssertionError, KeyError)
    if find_spec("triton") is None:
        return known
    from triton.errors import TritonError

    return (*known, TritonError)


def times(problem: Problem, arms: Mapping[str, Arm], rounds: int, warmup: int) -> dict[str, list[float]]:
    """Seconds of each arm, called in turn."""
    calls = {name: clock(arm.run, problem.device) for name, arm in arms.items()}
    return alternate(calls, rounds=rounds, warmup=warmup)


def extra_mib(arm: Arm) -> float:
    """Peak of one call of a warm arm beyond what was held and beyond its results, in this process."""
    gc.collect()
    peak = PeakMemory()
    outputs = arm.run()
    return peak.mib() - sum(each.numel() * each.element_size() for each in outputs.values()) / MIB


def extra_mib_here(problem: Problem, name: str) -> float:
    """`extra_mib` in a process that has called nothing yet: on a tiny case first, to load libraries."""
    arm = build(problem, name)
    warm = arm if arm.compiled else build(problem.tiny(), name)
    warm.run()
    return extra_mib(arm)


def extra_mib_apart(command: Sequence[str]) -> float:
    """`extra_mib_here` in a process of its own, which prints it as JSON last."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(128 * 1024), "MALLOC_TRIM_THRESHOLD_": str(128 * 1024)}
    line = [sys.executable, "-m", *command]
    root = Path(__file__).parents[1]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True, env=environment, cwd=root)
    return float(json.loads(done.stdout.splitlines()[-1])["extra_mib"])


def figures(
    problem: Problem,
    seconds: Mapping[str, Sequence[float]],
    errors: Mapping[str, Mapping[str, float]],
    notes: Mapping[str, str],
    memory: Mapping[str, float],
    bounds: Ceilings,
) -> dict[str, Any]:
    """The arms' rows: times, ratios to the floor, share of the ceiling, memory."""
    rows: dict[str, Any] = {}
    for name, measured in seconds.items():
        middle = median(measured)
        spread = quantiles(measured, n=5, method="inclusive") if len(measured) > 1 else measured
        row: dict[str, Any] = {"median_ms": 1e3 * middle, "p20_ms": 1e3 * spread[0], "p80_ms": 1e3 * spread[-1]}
        if FLOOR in seconds:
            row["time/floor"] = asdict(ratio(seconds, name, FLOOR))
        row["ceiling_share"] = bounds.share(middle, problem.flops, problem.moved)
        row |= {"tflop_s": problem.flops / middle / 1e12, "gb_s": problem.moved / middle / 1e9}
        if name in memory:
            row["extra_mib"] = memory[name]
            row["extra_beyond_accumulator_mib"] = memory[name] - problem.accumulator / MIB
            if memory.get(EAGER, 0) > 0:
                row["extra/eager"] = memory[name] / memory[EAGER]
        rows[name] = row | {"errors": errors.get(name, {}), "note": notes.get(name, "")}
    return rows
