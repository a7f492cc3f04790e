"""One update at the shape of Qwen2.5-VL-3B on a GPU: shared against repeated prompts with the same kernels.

    python -m benchmarks.update --out benchmarks/results/update-h100.json

Random weights, bfloat16, activation checkpointing, 1,024 image tokens, 8 prompts x 8 completions of 256 tokens, no
optimizer. Arms in turn, medians, in one process; the reference model is theirs together. Reported beside the ratio of
times: the ratio of matrix operations (`benchmarks.flops`); model FLOPs utilization, which is operations by time over
the bfloat16 GEMM rate measured in the same run, each computed token once and no recomputation counted; peak memory
above the weights.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks import model as bench_model
from benchmarks.device import ceilings, default_device
from benchmarks.flops import update_flops
from benchmarks.harness import CheckFailed, PeakMemory, alternate, ratio, require_equal, timed, write_result
from benchmarks.model import SHAPES
from benchmarks.step_arms import OurArm, figures
from vlmr1.reference import Reference

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    with TemporaryDirectory() as folder:
        try:
            result = measure(options, Path(folder))
        except CheckFailed as error:
            print(f"refused: {error}", file=sys.stderr)
            return 1
    for name, value in result.items():
        if not isinstance(value, dict) or name not in ("seconds", "check"):
            print(f"{name:28}{value}")
    if options.out is not None:
        print(f"written: {write_result(options.out, result)}")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.update", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="3b")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--completion_length", type=int, default=SHAPES["3b"].completion_length)
    parser.add_argument("--tokens_per_pack", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--freeze_vision", action="store_true")
    parser.add_argument("--out", type=Path, help="result file, JSON")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Check, times, memory and utilization of both arms."""
    device, dtype = default_device(), DTYPES[options.dtype]
    shape = replace(SHAPES[options.shape], completion_length=options.completion_length)
    model, processor = bench_model.build(folder, shape, device=device, dtype=dtype)
    model.gradient_checkpointing_enable()
    groups = bench_model.groups(folder, model, processor, options.prompts, shape)
    settings = {"tokens_per_pack": options.tokens_per_pack, "freeze_vision": options.freeze_vision}
    arms = {"shared": OurArm("shared", model, processor, groups, folder / "shared", **settings)}
    arms["repeated"] = OurArm("repeated", model, processor, groups, folder / "repeated", beta=0.0, **settings)
    share_reference(arms["shared"], arms["repeated"])

    checked = {name: figures(arm) for name, arm in arms.items()}
    require_equal(checked, tolerance=1e-4 if dtype == torch.float32 else 5e-2)
    calls = {name: timed(lambda arm=arm: run(arm)) for name, arm in arms.items()}
    seconds = alternate(calls, rounds=options.rounds, warmup=1)
    result: dict[str, Any] = {"shape": options.shape, "dtype": options.dtype, "prompts": options.prompts}
    result |= {"tokens_per_pack": options.tokens_per_pack, "check": checked, "seconds": seconds}
    result["median_ms"] = {name: 1e3 * median(times) for name, times in seconds.items()}
    result["time repeated/shared"] = ratio(seconds, "repeated", "shared")
    flops = {
        name: update_flops(model.config, arm.trainer.pack(groups)[0], reference=True) for name, arm in arms.items()
    }
    result["predicted"] = flops["repeated"] / flops["shared"]
    result["of predicted"] = result["time repeated/shared"].value / result["predicted"]
    rate = 1e12 * ceilings(device, dtype).matmul_tflop_s
    result["gemm_tflops"] = rate / 1e12
    result["utilization"] = {name: flops[name] / median(times) / rate for name, times in seconds.items()}
    result["peak_mib"] = {name: peak(arm) for name, arm in arms.items()}
    return result


def share_reference(owner: OurArm, other: OurArm) -> None:
    """One reference model for both arms; the second is made without one, so that memory holds a single copy."""
    assert owner.trainer.reference is not None
    other.trainer.settings = owner.trainer.settings
    forward = other.trainer._forward_of(owner.trainer.reference.model)
    other.trainer.reference = Reference(forward, other.trainer.policy.model)


def run(arm: OurArm) -> None:
    arm.model.zero_grad(set_to_none=True)
    arm.update()


def peak(arm: OurArm) -> float:
    """MiB above weights, gradients included, during one update."""
    arm.model.zero_grad(set_to_none=True)
    before = PeakMemory()
    arm.update()
    return before.mib()


if __name__ == "__main__":
    sys.exit(main())
