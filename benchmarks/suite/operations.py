"""The sections `ops` and `attention`: cases of the op benchmarks (`benchmarks/bench_*.py`) that fit the shape."""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import Any

from benchmarks import op
from benchmarks.suite.context import Context

OPS = {
    "ops": ("linear_grpo_loss", "linear_logprob", "grpo_loss", "group_advantages"),
    "attention": ("shared_prefix_attention", "varlen_attention", "shared_prefix_decode"),
}
# Of the tiny model: its rows, its heads, a vocabulary of its size.
TINY = {
    "linear_grpo_loss": ("128x192x490-{dtype}-trainable", "128x192x490-{dtype}-frozen"),
    "linear_logprob": ("128x192x490-{dtype}-no_grad",),
    "grpo_loss": ("128x8",),
    "group_advantages": ("8x4",),
    "shared_prefix_attention": ("2x41x4x16-6x2x32-{dtype}",),
    "varlen_attention": ("4x16-4x4x32-{dtype}",),
    "shared_prefix_decode": ("2x4x41x16-6x2x32-{dtype}",),
}
ELSEWHERE = {  # what marks a case as of another shape
    "bench": ("151936", "152064", "28x4x128"),
    "3b": ("152064", "28x4x128"),
    "7b": ("x2048x151936",),
}
DTYPES = ("float32", "bfloat16")
SLOW = "compile"  # it compiles for its shapes, which takes longer than a quick run


def cases(context: Context, name: str) -> list[str]:
    """The cases of an op that are measured for this shape."""
    options = context.options
    if context.shape_name == "tiny":
        return [text.format(dtype=options.dtype) for text in TINY[name]]
    known = bench(name).cases[options.device]
    other = [dtype for dtype in DTYPES if dtype != options.dtype]
    unwanted = (*ELSEWHERE[context.shape_name], *other)
    fitting = [text for text in known if not any(mark in text for mark in unwanted)]
    return fitting[:1] if options.quick else fitting


def bench(name: str) -> op.Bench:
    return import_module(f"benchmarks.bench_{name}").BENCH


def operations(context: Context, section: str) -> dict[str, Any]:
    """Every case: checked against its oracle, timed in turn with its floor, and its memory."""
    options, found = context.options, context.progress.section
    for name in OPS[section]:
        texts = cases(context, name)
        if not texts:
            context.skip(section, {name: f"no case of it is in {options.dtype}"})
        for text in texts:
            key = f"{name} {text}"
            problem = bench(name).problem(text, options.device)
            arms = [arm for arm in problem.arms() if not (options.quick and arm == SLOW)]
            given = argparse.Namespace(
                arms=arms,
                rounds=max(options.rounds, 5),
                warmup=1,
                no_memory=options.quick,
                device=options.device,
                threads=options.threads,
            )
            case = op.one_case(bench(name), text, problem, given, context.ceilings)
            found[key] = {"op": name, "case": text, **case}
            if options.quick and SLOW in problem.arms():
                case["skipped"] |= {SLOW: f"{name}: a quick run compiles nothing for its shapes"}
            context.skipped |= {f"{section}/{key}/{arm}": reason for arm, reason in case["skipped"].items()}
            floor = {arm: row["time/floor"]["value"] for arm, row in case["arms"].items() if "time/floor" in row}
            context.print(f"{section}/{key}: " + ", ".join(f"{arm} {value:.2f}" for arm, value in floor.items()))
    return found
