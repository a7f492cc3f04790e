"""Does training with everything shared learn what the naive trainer learns? Reward curves of both, in bfloat16.

    python -m benchmarks.agreement --steps 200 --seeds 0 1 2 --out benchmarks/results/agreement.json

The tiny model's GRPO recipe is trained by both arms with the same seeds, each run in a process of its own. In
bfloat16 the arms round differently, so that their completions part after some steps, as those of two seeds do. The
distance of two runs is the root mean square of the difference of their rewards, averaged over windows of steps. The
arms agree where a seed's naive and shared run are no further apart than the naive runs of two seeds are.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.harness import table, write_result

ARMS = {"shared": [], "naive": ["--share_vision", "false", "--share_prompt", "false", "--pack", "false"]}
Curve = list[float]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    runs = [(arm, seed) for seed in options.seeds for arm in reversed(ARMS)]
    with TemporaryDirectory() as folder, ThreadPoolExecutor(options.processes) as pool:
        work = Path(options.work or folder)
        found = pool.map(lambda run: train(run[0], run[1], options.steps, work), runs)
        curves = {arm: {} for arm in ARMS}
        for (arm, seed), rewards in zip(runs, found, strict=True):
            curves[arm][seed] = rewards
    result = compare(curves, options.window)
    print(report(result))
    if options.out is not None:
        print(f"written: {write_result(options.out, result | {'window': options.window, 'curves': curves})}")
    return 0 if result["agree"] else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.agreement", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="at least two")
    parser.add_argument("--window", type=int, default=20, help="steps that are averaged to one point of a curve")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each")
    parser.add_argument("--work", type=Path, help="keep the runs here; those that are complete are not run again")
    parser.add_argument("--out", type=Path, help="result file, JSON")
    options = parser.parse_args(arguments)
    if len(options.seeds) < 2:
        parser.error("--seeds: the spread of one seed is unknown")
    return options


def train(arm: str, seed: int, steps: int, work: Path) -> Curve:
    """Mean reward of each step of one run."""
    output = work / f"{arm}-{seed}"
    words = ["--recipe", "tiny-digits", "--bf16", "true", "--max_steps", str(steps), "--seed", str(seed)]
    words += ["--use_cpu", str(not torch.cuda.is_available()), "--output_dir", str(output), "--log_completions", "0"]
    words += ["--disable_tqdm", "true", *ARMS[arm]]
    command = [sys.executable, "-m", "vlmr1.cli", "train", *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rewards = [row["reward"] for row in rows if "reward" in row]
    if len(rewards) != steps:
        raise ChildProcessError(f"{output} has {len(rewards)} steps, not {steps}")
    return rewards


def windows(curve: Curve, window: int) -> Curve:
    """Means of consecutive windows; what does not fill one is left out."""
    return [sum(curve[i : i + window]) / window for i in range(0, len(curve) - window + 1, window)]


def distance(one: Curve, other: Curve, window: int) -> float:
    """Root mean square of the difference of two curves' windows."""
    pairs = list(zip(windows(one, window), windows(other, window), strict=True))
    return (sum((a - b) ** 2 for a, b in pairs) / len(pairs)) ** 0.5


def compare(curves: Mapping[str, Mapping[int, Curve]], window: int) -> dict:
    """Distances of naive to shared by seed, those between naive runs, and whether the first are within the second."""
    naive, shared = curves["naive"], curves["shared"]
    spread = {f"{a} and {b}": distance(naive[a], naive[b], window) for a, b in combinations(naive, 2)}
    apart = {str(seed): distance(naive[seed], shared[seed], window) for seed in naive}
    last = {arm: {str(seed): windows(c, window)[-1] for seed, c in of.items()} for arm, of in curves.items()}
    agree = max(apart.values()) <= max(spread.values())
    return {"naive to shared": apart, "naive to naive": spread, "last window": last, "agree": agree}


def report(result: dict) -> str:
    last = result["last window"]
    rows = [
        [seed, f"{value:.4f}", f"{last['naive'][seed]:.3f}", f"{last['shared'][seed]:.3f}"]
        for seed, value in result["naive to shared"].items()
    ]
    head = ["seed", "naive to shared", "reward at the end, naive", "shared"]
    spread = ", ".join(f"seeds {pair}: {value:.4f}" for pair, value in result["naive to naive"].items())
    verdict = "within" if result["agree"] else "NOT within"
    return f"{table(head, rows)}\n\nnaive to naive, {spread}\nthe arms agree {verdict} the spread of seeds"


if __name__ == "__main__":
    sys.exit(main())
