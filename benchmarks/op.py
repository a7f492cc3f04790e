"""The command line of the op benchmarks: cases and arms to run, the table, the result file; and their tests.

python -m benchmarks.bench_linear_grpo_loss --rounds 7
python -m benchmarks.bench_linear_grpo_loss --cases 512x256x8192-float32-frozen --arms floor native eager
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from benchmarks import compare
from benchmarks.compare import FLOOR, Outputs, Problem
from benchmarks.device import Ceilings, ceilings, default_device, slug
from benchmarks.harness import RESULTS, CheckFailed, table, write_result


@dataclass(frozen=True, eq=False)
class Bench:
    """The benchmark of one op; `problem` makes a case from its text and a device."""

    op: str
    cases: Mapping[str, Sequence[str]]  # by device type
    problem: Callable[[str, str], Problem]
    memory: bool = True  # whether it is worth measuring

    @property
    def module(self) -> str:
        return f"benchmarks.bench_{self.op}"


def main(bench: Bench, arguments: Sequence[str] | None = None) -> int:
    options = parse(bench, arguments)
    if options.device == "cpu":
        torch.set_num_threads(options.threads)
    if options.memory is not None:
        problem = bench.problem(options.cases[0], options.device)
        print(json.dumps({"extra_mib": compare.extra_mib_here(problem, options.memory)}))
        return 0
    try:
        run(bench, options)
    except CheckFailed as error:
        print(f"refused: {error}", file=sys.stderr)
        return 1
    return 0


def parse(bench: Bench, arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m {bench.module}")
    parser.add_argument("--rounds", type=int, help="measured calls an arm; 5, on a GPU 20")
    parser.add_argument("--warmup", type=int, default=1, help="calls an arm before them")
    parser.add_argument("--threads", type=int, default=2, help="on a CPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device())
    parser.add_argument("--cases", nargs="+", help=f"like {bench.cases['cpu'][0]}")
    parser.add_argument("--arms", nargs="+", help="default: all that run here")
    parser.add_argument("--no-memory", action="store_true", help="time only")
    parser.add_argument("--out", type=Path, default=RESULTS, help="result file, or its folder: <op>-<device>.json")
    parser.add_argument("--memory", metavar="ARM", help=argparse.SUPPRESS)  # of one arm, in this process
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (20 if options.device == "cuda" else 5)
    options.cases = options.cases or list(bench.cases[options.device])
    if options.memory is None and options.out.is_dir():
        options.out /= f"{bench.op}-{slug(options.device)}.json"
    return options


def run(bench: Bench, options: argparse.Namespace) -> None:
    """Every case in turn; the file is written after each, so that a run cut short leaves what it measured."""
    results: dict[str, Any] = {}
    for text in options.cases:
        problem = bench.problem(text, options.device)
        bounds = ceilings(options.device, problem.dtype)  # anew: clocks and neighbours change
        results[text] = one_case(bench, text, problem, options, bounds)
        show(bench, text, problem, results[text])
        figures = {"op": bench.op, "rounds": options.rounds, "cases": results}
        write_result(options.out, figures)
    print(f"\nwritten: {options.out}")


def one_case(
    bench: Bench, text: str, problem: Problem, options: argparse.Namespace, bounds: Ceilings
) -> dict[str, Any]:
    """Check, time, measure memory."""
    names = options.arms or list(problem.arms())
    arms, errors, skipped = compare.checked(problem, names, problem.oracle())
    seconds = compare.times(problem, arms, options.rounds, options.warmup)
    notes = {name: arm.note for name, arm in arms.items()}
    memory: dict[str, float] = {}
    for name in seconds:
        if bench.memory and not options.no_memory and name != FLOOR:
            here = options.device == "cuda"
            memory[name] = compare.extra_mib(arms[name]) if here else _extra_mib_apart(bench, text, name, options)
    rows = compare.figures(problem, seconds, errors, notes, memory, bounds)
    work = {"flops": problem.flops, "moved_bytes": problem.moved, "accumulator_bytes": problem.accumulator}
    return work | {"ceilings": asdict(bounds), "arms": rows, "skipped": skipped, "seconds": seconds}


def show(bench: Bench, text: str, problem: Problem, case: Mapping[str, Any]) -> None:
    print(f"\n### {bench.op} {text}\n\n{markdown(case['arms'], problem)}\n")
    print("\n".join(f"- {name}: {reason}" for name, reason in case["skipped"].items()), flush=True)


def _extra_mib_apart(bench: Bench, text: str, name: str, options: argparse.Namespace) -> float:
    case = ["--cases", text, "--device", "cpu", "--threads", str(options.threads)]
    return compare.extra_mib_apart([bench.module, "--memory", name, *case])


def markdown(rows: Mapping[str, Any], problem: Problem) -> str:
    """The table of one case; a column that no arm fills is left out."""
    accumulator = problem.device == "cuda" and problem.accumulator > 0
    columns: dict[str, Callable[[Any], str]] = {
        "ms": lambda row: f"{row['median_ms']:.4g}",
        "20..80 %": lambda row: f"{row['p20_ms']:.4g}..{row['p80_ms']:.4g}",
        "x floor": lambda row: f"{row['time/floor']['value']:.2f}",
        "of ceiling": lambda row: f"{row['ceiling_share']:.0%}",
        "extra MiB": lambda row: f"{row['extra_beyond_accumulator_mib' if accumulator else 'extra_mib']:.1f}",
        "of eager's": lambda row: f"{row['extra/eager']:.2f}",
        "error": lambda row: f"{max(row['errors'].values()):.0e}" if row["errors"] else "-",
    }
    cells = {title: [_cell(column, row) for row in rows.values()] for title, column in columns.items()}
    cells = {title: column for title, column in cells.items() if set(column) != {"-"}}
    text = table(["arm", *cells], list(zip(rows, *cells.values(), strict=True)))
    return text + "\n\nextra MiB: beyond one float32 [V, D] accumulator" if accumulator else text


def _cell(column: Callable[[Any], str], row: Mapping[str, Any]) -> str:
    try:
        return column(row)
    except KeyError:
        return "-"


@lru_cache(maxsize=1)  # the arms of a case follow each other
def _problem(bench: Bench, text: str) -> tuple[Problem, Outputs]:
    problem = bench.problem(text, "cpu")
    return problem, problem.oracle()


def check_and_benchmark(benchmark: Any, bench: Bench, text: str, name: str, rounds: int = 5) -> None:
    """Body of a pytest-benchmark test: one arm of one CPU case, checked first."""
    import pytest

    problem, oracle = _problem(bench, text)
    arms, errors, skipped = compare.checked(problem, [name], oracle)
    if name in skipped:
        pytest.skip(skipped[name])
    benchmark.group = f"{bench.op} {text}"
    benchmark.extra_info.update(errors=errors[name], flops=problem.flops, bytes=problem.moved)
    benchmark.pedantic(arms[name].run, rounds=rounds, warmup_rounds=1)
