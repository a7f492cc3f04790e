"""One update of a bench-size Qwen2.5-VL: all sharing on, all off, and TRL; time and peak memory.

    python -m benchmarks.step --rounds 10 --out benchmarks/results/step.json

An update is the reference forward, the policy forward and the backward of one step's groups (no optimizer),
float32, on fixed random completions. The arms are timed in turn; TRL lives in a process of its own and is
called in the same turn, its seconds measured there. Peak memory: each arm in a process of its own, the
highest resident set during two updates, gradients included, above the resident set once model, reference and
inputs are there (`harness.PeakMemory`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks import model as bench_model
from benchmarks.harness import CheckFailed, PeakMemory, alternate, ratio, require_equal, write_result
from benchmarks.model import BENCH
from benchmarks.step_arms import ARMS, BETA, OurArm, Worker, figures, make, phases, seconds, serve

PAIRS = (("naive", "shared"), ("repeated", "shared"), ("trl", "shared"), ("naive", "trl"))


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    with ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(TemporaryDirectory()))
        if options.folder is None:
            bench_model.write(folder)
        if options.serve:
            answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
            serve(make(options.arm, folder, options.prompts, shape_of(options), options.beta), answers)
        elif options.memory:
            print(json.dumps({"arm": options.arm, "peak_mib": memory(options, folder)}))
        else:
            try:
                compare(options, folder)
            except CheckFailed as error:
                print(f"refused: {error}", file=sys.stderr)
                return 1
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="measured updates an arm")
    parser.add_argument("--warmup", type=int, default=1, help="updates an arm before them")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=1, help="groups an update, the same in every arm")
    parser.add_argument("--generations", type=int, default=BENCH.num_generations, help="completions a group")
    parser.add_argument("--completion_length", type=int, default=BENCH.completion_length)
    parser.add_argument("--prompt_length", type=int, help="image tokens included; default: image and one line")
    parser.add_argument("--image_px", type=int, default=BENCH.image_px, help="side of the image; 28 x 28 px a token")
    parser.add_argument("--beta", type=float, default=BETA, help="0: no reference model, and no pass of it")
    parser.add_argument("--updates", type=int, default=2, help="that --memory is measured over")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["shared", "naive", "trl"])
    parser.add_argument("--profile", action="store_true", help="split the shared arm's update by phase")
    parser.add_argument("--out", type=Path, help="result file, JSON")
    parser.add_argument("--arm", choices=ARMS, default="shared", help="the one arm of --memory")
    parser.add_argument("--memory", action="store_true", help="print the peak memory of one arm in this process")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # a model that is already written
    return parser.parse_args(arguments)


def shape_of(options: argparse.Namespace) -> bench_model.Shape:
    return replace(
        BENCH,
        image_px=options.image_px,
        num_generations=options.generations,
        completion_length=options.completion_length,
        prompt_length=options.prompt_length,
    )


def compare(options: argparse.Namespace, folder: Path) -> None:
    """Check that the arms agree, time them in turn, measure their memory, print and write the table."""
    shape = shape_of(options)
    here = [name for name in options.arms if name != "trl"]
    local = {name: make(name, folder, options.prompts, shape, options.beta) for name in here}
    workers = {name: Worker(command(options, folder, name, "--serve")) for name in options.arms if name == "trl"}
    try:
        checked = {name: figures(arm) for name, arm in local.items()}
        checked |= {name: worker.ask("figures") for name, worker in workers.items()}
        require_equal(checked)
        calls: dict[str, Any] = {name: lambda arm=arm: seconds(arm) for name, arm in local.items()}
        calls |= {name: lambda worker=worker: worker.ask("seconds") for name, worker in workers.items()}
        measured = alternate(calls, rounds=options.rounds, warmup=options.warmup)
    finally:
        for worker in workers.values():
            worker.close()
    result: dict[str, Any] = {"check": checked, "seconds": measured}
    result["median_ms"] = {name: 1e3 * median(times) for name, times in measured.items()}
    pairs = [(a, b) for a, b in PAIRS if {a, b} <= measured.keys()]
    result |= {f"time {a}/{b}": ratio(measured, a, b) for a, b in pairs}
    shared = local.get("shared")
    if options.profile and isinstance(shared, OurArm):
        splits = [phases(shared) for _ in range(options.rounds + 1)][1:]
        result["phases_ms"] = {name: 1e3 * median(split[name] for split in splits) for name in splits[0]}
    local.clear()
    result["peak_mib"] = {name: memory_of(options, folder, name) for name in options.arms}
    result |= {f"memory {a}/{b}": result["peak_mib"][a] / result["peak_mib"][b] for a, b in pairs}
    report(options, result)
    if options.out is not None:
        print(f"written: {write_result(options.out, result)}")


def command(options: argparse.Namespace, folder: Path, name: str, *mode: str) -> list[str]:
    """This benchmark for one arm, in a process of its own."""
    words = ["--threads", str(options.threads), "--prompts", str(options.prompts), "--folder", str(folder)]
    words += ["--generations", str(options.generations), "--completion_length", str(options.completion_length)]
    words += ["--image_px", str(options.image_px), "--beta", str(options.beta), "--updates", str(options.updates)]
    if options.prompt_length is not None:
        words += ["--prompt_length", str(options.prompt_length)]
    return [sys.executable, "-m", "benchmarks.step", "--arm", name, *mode, *words]


def memory(options: argparse.Namespace, folder: Path) -> float:
    """Peak memory of some updates of one arm, in MiB above what model and inputs take."""
    arm = make(options.arm, folder, options.prompts, shape_of(options), options.beta)
    peak = PeakMemory()
    for _ in range(options.updates):
        seconds(arm)
    return peak.mib()


def memory_of(options: argparse.Namespace, folder: Path, name: str) -> float:
    done = subprocess.run(
        command(options, folder, name, "--memory"),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ,
    )
    return float(json.loads(done.stdout.splitlines()[-1])["peak_mib"])


def report(options: argparse.Namespace, result: dict[str, Any]) -> None:
    """The table."""
    print(f"\n{options.prompts} prompt(s), {options.rounds} rounds, {options.threads} threads")
    print(f"{'arm':8}{'median ms':>12}{'peak MiB':>12}")
    for name, milliseconds in result["median_ms"].items():
        print(f"{name:8}{milliseconds:12.0f}{result['peak_mib'][name]:12.0f}")
    for name, value in result.items():
        if name.startswith("time "):
            print(f"{name:20}{value}")
        elif name.startswith("memory "):
            print(f"{name:20}{value:.2f}")
    total = sum(result.get("phases_ms", {}).values())
    for name, milliseconds in result.get("phases_ms", {}).items():
        print(f"  {name:24}{milliseconds:9.0f} ms {milliseconds / total:6.0%}")


if __name__ == "__main__":
    sys.exit(main())
