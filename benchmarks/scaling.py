"""What sharing gains over group size, prompt and completion length, beside what counting operations predicts.

    python -m benchmarks.scaling --out benchmarks/results/scaling.json

An update of the bench model (the policy's forward and backward without a reference model; one group, float32), naive
and shared in turn; both must give the same loss and gradient norm first, which warms them up.
Predicted: the ratio of the matrix operations of both (`benchmarks.flops`). Memory: each arm in a process of its own,
one update.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks import model as bench_model
from benchmarks.flops import update_flops
from benchmarks.harness import CheckFailed, PeakMemory, alternate, ratio, require_equal, table, write_result
from benchmarks.model import BENCH, Shape
from benchmarks.step_arms import OurArm, figures, seconds
from benchmarks.suite.quoted import pivot

IMAGE_PX = {128: 224, 512: 560, 1024: 784}  # 64 of 128 tokens, 400 of 512, 784 of 1024
ARMS = ("shared", "naive")
SETTINGS: dict[str, Any] = {"beta": 0.0, "skip_zero_advantage": False}
HEAD = ["G x prompt x completion", "naive / shared, time", "rounds", "predicted", "memory, naive / shared", "MiB"]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.show is not None:
        print(pivot(json.loads(options.show.read_text(encoding="utf-8"))["figures"]["cells"]))
        return 0
    torch.set_num_threads(options.threads)
    if options.one is not None:
        print(json.dumps({"peak_mib": peak_here(options)}))
        return 0
    cells = list(product(options.generations, options.prompt_lengths, options.completion_lengths))
    result: dict[str, Any] = {"prompts": 1, "beta": 0, "threads": options.threads, "cells": []}
    with TemporaryDirectory() as name:
        folder = bench_model.write(Path(name))
        model, processor = bench_model.read(folder)
        for generations, prompt_length, completion_length in cells:
            shape = shape_of(generations, prompt_length, completion_length)
            try:
                cell = measure(options, folder, model, processor, shape)
            except CheckFailed as error:
                print(f"refused: {error}", file=sys.stderr)
                return 1
            result["cells"].append(cell)
            print(*row(cell), sep=" | ", flush=True)
            if options.out is not None:  # after each cell: a table takes an hour
                write_result(options.out, result)
    print(table(HEAD, [row(cell) for cell in result["cells"]]))
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--generations", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--prompt_lengths", type=int, nargs="+", default=list(IMAGE_PX), choices=list(IMAGE_PX))
    parser.add_argument("--completion_lengths", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--seconds", type=float, default=12, help="about what the rounds of a cell take")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--show", type=Path, help="only print the table of this result file")
    parser.add_argument("--out", type=Path, help="result file, JSON")
    parser.add_argument("--one", choices=ARMS, help=argparse.SUPPRESS)  # its memory in this process, of the first cell
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of the model
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace, folder: Path, model: Any, processor: Any, shape: Shape) -> dict[str, Any]:
    """One cell: samples, ratios, prediction."""
    groups = bench_model.groups(folder, model, processor, 1, shape)
    arms = {name: OurArm(name, model, processor, groups, folder / "output", **SETTINGS) for name in ARMS}
    require_equal({name: figures(arm) for name, arm in arms.items()})
    calls = {name: lambda arm=arm: seconds(arm) for name, arm in arms.items()}
    first = alternate(calls, rounds=1, warmup=0)
    rounds = min(6, max(1, round(options.seconds / sum(times[0] for times in first.values()))))
    more = alternate(calls, rounds=rounds, warmup=0)
    samples = {name: first[name] + more[name] for name in calls}
    packs = {name: arm.trainer.runner.packs(groups) for name, arm in arms.items()}
    flops = {name: update_flops(model.config, of, reference=False) for name, of in packs.items()}
    arms.clear()
    model.zero_grad(set_to_none=True)
    peak = {name: peak_apart(options, folder, name, shape) for name in ARMS}
    time = ratio(samples, "naive", "shared")
    return {
        "generations": shape.num_generations,
        "prompt": shape.prompt_length,
        "completion": shape.completion_length,
        "seconds": samples,
        "median_ms": {name: 1e3 * median(times) for name, times in samples.items()},
        "time": {"value": time.value, "low": time.low, "high": time.high},
        "predicted": flops["naive"] / flops["shared"],
        "peak_mib": peak,
        "memory": peak["naive"] / peak["shared"],
    }


def shape_of(generations: int, prompt_length: int, completion_length: int) -> Shape:
    sizes = {"num_generations": generations, "prompt_length": prompt_length, "completion_length": completion_length}
    return replace(BENCH, image_px=IMAGE_PX[prompt_length], **sizes)


def peak_here(options: argparse.Namespace) -> float:
    """Peak memory of one update of one arm, in MiB above what model and inputs take."""
    shape = shape_of(options.generations[0], options.prompt_lengths[0], options.completion_lengths[0])
    model, processor = bench_model.read(options.folder)
    groups = bench_model.groups(options.folder, model, processor, 1, shape)
    arm = OurArm(options.one, model, processor, groups, options.folder / "output", **SETTINGS)
    peak = PeakMemory()
    seconds(arm)
    return peak.mib()


def peak_apart(options: argparse.Namespace, folder: Path, name: str, shape: Shape) -> float:
    """`peak_here` in a process of its own."""
    words = ["--one", name, "--folder", str(folder), "--threads", str(options.threads)]
    words += ["--generations", str(shape.num_generations), "--prompt_lengths", str(shape.prompt_length)]
    words += ["--completion_lengths", str(shape.completion_length)]
    line = [sys.executable, "-m", "benchmarks.scaling", *words]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
    return float(json.loads(done.stdout.splitlines()[-1])["peak_mib"])


def row(cell: dict[str, Any]) -> list[str]:
    """A cell as a line of the table."""
    time, peak = cell["time"], cell["peak_mib"]
    return [
        f"{cell['generations']} x {cell['prompt']} x {cell['completion']}",
        f"{time['value']:.2f} ({time['low']:.2f} to {time['high']:.2f})",
        str(len(cell["seconds"]["naive"])),
        f"{cell['predicted']:.2f}",
        f"{cell['memory']:.2f}",
        f"{peak['naive']:.0f} / {peak['shared']:.0f}",
    ]


if __name__ == "__main__":
    sys.exit(main())
