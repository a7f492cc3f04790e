"""Golden runs: record them at one commit, compare them at another, on one machine.

    python -m tests.golden.runs --record FILE [--tree DIR] [--only NAME ...] [--jobs N]
    python -m tests.golden.runs --compare FILE [--tree DIR] [--only NAME ...] [--jobs N]

Each run is `vlmr1 train` of five updates on CPU in processes of their own. Metrics of every step and a digest of the
final weights are compared bit for bit: another machine, or another torch, may round differently. `--tree` is a
checkout of the product with its native library built; default: this one."""

import argparse
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from tests.golden.cases import CASES, OUTPUT, UPDATES, Case, arguments, write_inputs

HERE = Path(__file__).parent
RECORDED = HERE / "recorded.json"
LIMIT = 900  # seconds a run
PACKAGES = ("torch", "transformers", "accelerate", "numpy", "peft", "safetensors", "tokenizers")
# Metrics that are measured, not computed: times, memory and what is made of them.
RENAMED = {"rollout/sent_back": "rollout/preemptions"}  # metrics of the recorded tree that have another name now
LEFT_OUT = re.compile("second|^memory/|^gpu/|runtime")


class RunError(Exception):
    """A golden run that did not end as it should."""


def run(name: str, tree: Path, folder: Path) -> dict[str, Any]:
    """Metrics and weights of one case, run in a new folder."""
    case, output = CASES[name], folder / OUTPUT
    write_inputs(folder)
    _train(case, tree, folder, case.faults, status=9 if case.killed else 0)
    if case.killed:
        _train(case, tree, folder, {})
    metrics = read_metrics(output)
    _check(case, metrics)
    return {"metrics": metrics, "weights": digest(output / f"checkpoint-{UPDATES}")}


def read_metrics(output: Path) -> list[dict[str, float]]:
    """The computed metrics of every step."""
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [{RENAMED.get(k, k): v for k, v in row.items() if not LEFT_OUT.search(k)} for row in rows]


def digest(checkpoint: Path) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of all tensors of a checkpoint."""
    tensors = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if not tensors:
        raise RunError(f"no weights in {checkpoint}")
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        sha.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What two records of one case differ in, a line each."""
    found = []
    for one, other in zip(old["metrics"], new["metrics"], strict=False):
        for name in sorted(one.keys() | other.keys()):
            before, after = (repr(row[name]) if name in row else "absent" for row in (one, other))
            if before != after:
                found.append(f"step {one['step']}: {name}: {before} -> {after}")
    steps = [len(each["metrics"]) for each in (old, new)]
    if steps[0] != steps[1]:
        found.append(f"{steps[0]} steps -> {steps[1]}")
    if old["weights"] != new["weights"]:
        found.append(f"weights: {old['weights'][:16]} -> {new['weights'][:16]}")
    return found


def environment() -> dict[str, Any]:
    """What bit-equal results need to have in common."""
    cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in cpu.splitlines())}
    flags = " ".join(flag for flag in fields.get("flags", "").split() if re.match("avx|amx|fma|sse4", flag))
    names = {"python": platform.python_version(), "cpu": fields.get("model name", platform.machine()), "flags": flags}
    return names | {name: version(name) for name in PACKAGES}


def main(words: Sequence[str] | None = None) -> int:
    options = _parse(words)
    if not list((options.tree / "kernels/vlmr1_kernels/native").glob("*.so")):
        print(f"{options.tree} has no native library: build it, or copy it there", file=sys.stderr)
        return 2
    recorded = {"runs": {}} if options.record else json.loads(options.compare.read_text(encoding="utf-8"))
    if options.compare:
        _compare_environments(recorded["environment"])
    new, status = {"environment": environment(), "runs": {}}, 0
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(options.jobs) as pool:
        folder = Path(options.keep or scratch)
        waiting = {name: pool.submit(run, name, options.tree, folder / name) for name in options.only}
        for name, future in waiting.items():
            try:
                new["runs"][name] = future.result()
                old = recorded["runs"].get(name)
                found = [] if options.record else ["not recorded"] if old is None else differences(old, future.result())
                told = [f"{len(found)} differences" if found else "recorded" if options.record else "equal", *found]
            except RunError as error:
                found = told = [str(error)]
            print(f"{name}: " + "\n  ".join(told), flush=True)
            status = max(status, int(bool(found)))
    if options.record and status == 0:  # all runs, or none where one fails
        options.record.write_text(json.dumps(new, indent=1) + "\n", encoding="utf-8")
    return status


def _compare_environments(old: Mapping[str, Any]) -> None:
    new = environment()
    for name in sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name)):
        print(f"note: {name} was {old.get(name)}, is {new.get(name)}: rounding may differ")


def _train(case: Case, tree: Path, folder: Path, faults: Mapping[str, Sequence[int]], status: int = 0) -> None:
    """RunError where the command ends with another status."""
    path = os.pathsep.join(map(str, (HERE / "faults", tree, tree / "kernels")))
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("VLMR1_", "GOLDEN_"))}
    variables |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    if faults:
        variables["GOLDEN_FAULTS"] = json.dumps(faults)
    command = [sys.executable, "-m", "vlmr1.cli", "train", *arguments(case)]
    done = subprocess.run(command, env=variables, cwd=folder, capture_output=True, text=True, timeout=LIMIT)
    if done.returncode != status:
        raise RunError(f"exit status {done.returncode} instead of {status}:\n{done.stderr[-3000:]}")


def _check(case: Case, metrics: Sequence[Mapping[str, float]]) -> None:
    """RunError where the run does not train, or does not exercise its subject."""
    if len(metrics) != UPDATES or any(row["skipped_updates"] for row in metrics):
        raise RunError(f"{len(metrics)} steps are logged, or updates were skipped")
    if sum(row["grad_norm"] > 0 and row["zero_variance_groups"] < 1 for row in metrics) < 3:
        raise RunError("too few updates with a gradient")
    if not case.shows(metrics):
        raise RunError("it does not exercise its subject")


def _parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--record", type=Path, metavar="FILE")
    what.add_argument("--compare", type=Path, metavar="FILE")
    parser.add_argument("--tree", type=lambda word: Path(word).resolve(), default=HERE.parents[1], metavar="DIR")
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES), metavar="NAME")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the runs' outputs there")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(main())
