"""Peak memory as `vlmr1 plan` says it, beside what a real run takes.

    python -m benchmarks.plan --out benchmarks/results/plan-cpu.json
    python -m benchmarks.plan --device cuda --shapes 3b 7b

Each shape in a process of its own: two updates of `GRPOTrainer.train` (rollout, reference, policy, optimizer) on random
weights, every completion as long as it may get; counted is the second. On a CPU: the highest resident set of each phase
above the resident set before the model was made (`harness.PeakMemory`); freed memory goes back to the system at once
(MALLOC_MMAP_THRESHOLD_), so that it is what was alive. On a GPU: what torch allocated. The plan's allowance for the
framework is left out. The plan has no constant that was fitted, to these shapes or to others; that images count was
found by comparing eight of them. What it leaves out on a CPU: kernels that oneDNN generates and keeps (bf16), and what
libraries hold.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.harness import MIB, table, write_result
from benchmarks.plan_step import CASES, measured, planned

HEAD = ["shape", "peak in", "measured MiB", "planned MiB", "planned / measured"]
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072"}


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    if options.one:
        with TemporaryDirectory() as folder:
            print(json.dumps(measured(CASES[options.one], Path(folder), options.device)))
        return 0
    names = options.shapes or [name for name, of in CASES.items() if of.device == options.device]
    result: dict[str, Any] = {"device": options.device, "threads": options.threads, "shapes": {}}
    with ThreadPoolExecutor(options.jobs) as pool:
        real = list(pool.map(lambda name: measure(name, options.device, options.threads), names))
    for name, found in zip(names, real, strict=True):
        result["shapes"][name] = compare(name, found, options.device)
        print(*row(name, result["shapes"][name]), sep=" | ", flush=True)
    if options.out is not None:
        write_result(options.out, result)
    print(table(HEAD, [row(name, found) for name, found in result["shapes"].items()]))
    worst = max(abs(found["ratio"] - 1) for found in result["shapes"].values())
    print(f"largest error of a peak: {100 * worst:.1f}%")
    return 0 if options.within is None or worst <= options.within / 100 else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shapes", nargs="+", choices=list(CASES), metavar="SHAPE", help=", ".join(CASES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="shapes measured side by side; on a GPU one")
    parser.add_argument("--within", type=float, help="exit status 1 where a peak is off by more percent")
    parser.add_argument("--out", type=Path, help="result file, JSON")
    parser.add_argument("--one", choices=list(CASES), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def measure(name: str, device: str, threads: int) -> dict[str, float]:
    """MiB of each phase, in a process of its own, and the tokens of a prompt."""
    words = [sys.executable, "-m", "benchmarks.plan", "--one", name, "--device", device, "--threads", str(threads)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **ENVIRONMENT})
    return json.loads(done.stdout.splitlines()[-1])


def compare(name: str, real: dict[str, float], device: str) -> dict[str, Any]:
    """Measured and planned MiB of each phase, and of the step."""
    prompt_tokens = int(real.pop("prompt_tokens"))
    with TemporaryDirectory() as folder:
        plan = planned(CASES[name], prompt_tokens, Path(folder), device)
    said = {phase: (plan.total(phase) - causes["framework"]) / MIB for phase, causes in plan.phases.items()}
    peak, expected = max(real.values()), max(said.values())
    return {
        "settings": dict(CASES[name].settings),
        "prompt_tokens": prompt_tokens,
        "parameters": plan.parameters,
        "measured_mib": real,
        "planned_mib": said,
        "phase": max(real, key=lambda phase: real[phase]),
        "ratio": expected / peak,
    }


def row(name: str, found: dict[str, Any]) -> list[str]:
    real, said = max(found["measured_mib"].values()), max(found["planned_mib"].values())
    return [name, found["phase"], f"{real:.0f}", f"{said:.0f}", f"{found['ratio']:.3f}"]


if __name__ == "__main__":
    sys.exit(main())
