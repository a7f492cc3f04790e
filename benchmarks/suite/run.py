"""A run of the suite: sections in turn, the result file after each."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch

from benchmarks.attention import DTYPES
from benchmarks.device import ceilings
from benchmarks.harness import CheckFailed, machine, write_result
from benchmarks.suite.context import Context
from benchmarks.suite.memory import memory
from benchmarks.suite.operations import operations
from benchmarks.suite.options import SECTIONS, Options
from benchmarks.suite.progress import Progress
from benchmarks.suite.rollout import rollout
from benchmarks.suite.step import step
from benchmarks.suite.update import update
from vlmr1.telemetry.phases import gpu_info

LAYOUT = 1
CEILING_ROUNDS, QUICK_CEILING_ROUNDS = 10, 3
RUN: dict[str, Callable[[Context], dict[str, Any]]] = {
    "ops": partial(operations, section="ops"),
    "attention": partial(operations, section="attention"),
    "rollout": rollout,
    "update": update,
    "step": step,
    "memory": memory,
}


def run(options: Options, shape: str) -> Path:
    """Every chosen section on one shape; the result file. It is written after each section, and where something stops
    the run within one: what was measured is kept, and the file says that it is not complete.

    CheckFailed where arms compute different things, SettingError where the shape does not fit."""
    start = perf_counter()
    if options.device == "cpu":
        torch.set_num_threads(options.threads)
    path = new_file(options.out, shape)
    bounds = ceilings(options.device, DTYPES[options.dtype], QUICK_CEILING_ROUNDS if options.quick else CEILING_ROUNDS)
    with TemporaryDirectory() as folder:
        context = Context(options, shape, Path(folder), bounds)
        try:
            _sections(context, path)
        finally:
            context.drop_bed()
    context.print(f"{shape}: {perf_counter() - start:.0f} s in all; written: {path}")
    return path


def _sections(context: Context, path: Path) -> None:
    figures = head(context)
    names = [name for name in SECTIONS if name in context.options.only]
    for place, section in enumerate(names):
        begun = perf_counter()
        context.progress = Progress()
        try:
            _write(path, figures, section, RUN[section](context), names[place + 1 :], begun)
        except CheckFailed:  # its samples say nothing
            raise
        except BaseException:
            measured = context.progress.so_far()
            if measured or figures["sections"]:
                context.print(f"stopped in {section}; what was measured is kept in {path}")
                _write(path, figures, section, measured, names[place:], begun)
            raise


def _write(
    path: Path, figures: dict[str, Any], section: str, measured: dict[str, Any], left: list[str], begun: float
) -> None:
    """The file with one more section; `left` are the names of those that are still to come to their end."""
    if measured.get("arms", True) and (measured or section not in left):
        figures["sections"][section] = measured
    figures["section_seconds"][section] = perf_counter() - begun
    figures |= {"complete": not left, "unfinished": left}
    write_result(path, figures)


def head(context: Context) -> dict[str, Any]:
    """What the result says beside its sections; `skipped` is the context's own."""
    options = context.options
    figures: dict[str, Any] = {"suite": LAYOUT, "device": options.device}
    if options.device == "cuda" and (gpus := gpu_info()):
        figures["driver"] = gpus[0].driver
    figures |= {"threads": torch.get_num_threads(), "quick": options.quick, "dtype": options.dtype}
    figures["shape"] = context.shape_name
    figures |= {"sizes": context.sizes(), "rounds": options.rounds, "warmup": 1}
    bounds = {"copy_gb_s": context.ceilings.copy_gb_s, "matmul_tflop_s": context.ceilings.matmul_tflop_s}
    return figures | {"ceilings": bounds, "sections": {}, "skipped": context.skipped, "section_seconds": {}}


def new_file(folder: Path, shape: str) -> Path:
    """Named by date, hardware and shape, and by a number where that is taken."""
    hardware = re.sub(r"[^a-z0-9]+", "-", machine().lower()).strip("-")
    name = f"{datetime.now(UTC):%Y-%m-%d}-{hardware}-{shape}"
    path, number = folder / f"{name}.json", 1
    while path.exists():
        number += 1
        path = folder / f"{name}-{number}.json"
    return path
