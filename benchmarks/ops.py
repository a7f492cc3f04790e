"""The table of op cases, and how one is checked and measured.

`bench_ops.py` runs the cases for a CPU by pytest-benchmark (`make bench-ops`), `gpu.py` those for CUDA. Every arm is
checked against an oracle in a wider dtype before it is timed. `floor` is the least that any implementation does: the
matrix products of the case, or a copy of as many bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from benchmarks.harness import (
    MIB,
    CheckFailed,
    PeakMemory,
    alternate,
    clock_of,
    ratio,
)
from benchmarks.op_attention import decode, shared_prefix, varlen
from benchmarks.op_calls import FLOOR, Call, Outputs, Problem, Unavailable, failures
from benchmarks.op_head import advantages, grpo, linear_grpo, linear_logp
from vlmr1_kernels import ImplementationError
from vlmr1_kernels.testing import relative_error


@dataclass(frozen=True)
class Case:
    """A row of the table: an op, its shape as the builder takes it, the dtype, and the mode of a head."""

    op: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    mode: str = ""

    def __str__(self) -> str:
        return "-".join(filter(None, (self.op, "x".join(map(str, self.shape)), self.dtype, self.mode)))

    def problem(self, device: str) -> Problem:
        options = {"mode": self.mode} if self.mode else {}
        return BUILDERS[self.op](*self.shape, dtype=getattr(torch, self.dtype), device=device, **options)


BUILDERS: Mapping[str, Callable[..., Problem]] = {
    "linear_grpo_loss": linear_grpo,  # N, D, V
    "linear_logprob": linear_logp,
    "grpo_loss": grpo,  # N, B
    "group_advantages": advantages,  # B, G
    "shared_prefix_attention": shared_prefix,  # groups, prompt, branches, branch length, H, Hkv, Dh
    "varlen_attention": varlen,  # sequences, length, H, Hkv, Dh
    "shared_prefix_decode": decode,  # groups, branches, prefix, suffix, H, Hkv, Dh
}
LINEAR_GRPO, LINEAR_LOGP = "linear_grpo_loss", "linear_logprob"
PREFIX, VARLEN, DECODE = "shared_prefix_attention", "varlen_attention", "shared_prefix_decode"
LARGE = ((8192, 2048, 151936), (16384, 3584, 152064))
CASES: Mapping[str, Sequence[Case]] = {
    "tiny": [
        *(Case(LINEAR_GRPO, (128, 192, 490), mode=mode) for mode in ("trainable", "frozen")),
        Case(LINEAR_LOGP, (128, 192, 490), mode="no_grad"),
        Case("grpo_loss", (128, 8)),
        Case("group_advantages", (8, 4)),
        Case(PREFIX, (2, 41, 4, 16, 6, 2, 32)),
        Case(VARLEN, (4, 16, 4, 4, 32)),
        Case(DECODE, (2, 4, 41, 16, 6, 2, 32)),
    ],
    "cpu": [
        *(
            Case(LINEAR_GRPO, shape, dtype, mode)
            for shape in ((512, 256, 8192), (256, 1024, 151936))
            for dtype in ("float32", "bfloat16")
            for mode in ("trainable", "frozen")
        ),
        *(Case(LINEAR_LOGP, (512, 256, 8192), dtype, "no_grad") for dtype in ("float32", "bfloat16")),
        Case(LINEAR_LOGP, (512, 256, 8192), mode="trainable"),
        *(Case("grpo_loss", shape) for shape in ((8192, 64), (262144, 512))),
        *(Case("group_advantages", shape) for shape in ((64, 8), (65536, 8))),
        Case(PREFIX, (1, 298, 8, 64, 16, 2, 64)),
        Case(PREFIX, (2, 298, 8, 64, 16, 2, 64), "bfloat16"),
        Case(PREFIX, (8, 64, 8, 64, 4, 4, 32)),
        Case(VARLEN, (16, 64, 4, 4, 64)),
        Case(VARLEN, (16, 64, 16, 16, 80), "bfloat16"),
        Case(DECODE, (1, 8, 300, 64, 16, 2, 64)),
        Case(DECODE, (8, 8, 300, 64, 4, 2, 64)),
    ],
    "cuda": [  # in the order of what decides most: `gpu.py` takes as many as its time allows
        *(Case(LINEAR_GRPO, shape, "bfloat16", mode) for shape in LARGE for mode in ("trainable", "frozen")),
        Case(LINEAR_LOGP, LARGE[0], "bfloat16", "no_grad"),
        Case(DECODE, (8, 8, 1200, 256, 16, 2, 128), "bfloat16"),
        Case(DECODE, (2, 8, 1200, 2000, 16, 2, 128), "bfloat16"),
        Case(PREFIX, (5, 1200, 8, 255, 16, 2, 128), "bfloat16"),
        Case(PREFIX, (8, 100, 8, 48, 6, 2, 32)),
        Case(VARLEN, (128, 64, 16, 16, 80), "bfloat16"),
        Case(VARLEN, (4, 4096, 16, 16, 80), "bfloat16"),
        Case(DECODE, (8, 16, 4096, 256, 28, 4, 128), "bfloat16"),
        Case("grpo_loss", (16384, 64)),
        Case("group_advantages", (64, 8)),
    ],
}


def prepared(problem: Problem, name: str, oracle: Outputs) -> tuple[Call, dict[str, float]]:
    """Return (a call that agrees with the oracle, its errors); Unavailable where it cannot run here.

    CheckFailed where one of ours disagrees; a peer that fails or disagrees is Unavailable."""
    try:
        call = problem.arms[name]()
        outputs = call.run()
    except ImportError as error:
        raise Unavailable(f"cannot be imported: {error}") from None
    except ImplementationError as error:
        raise Unavailable(str(error)) from None
    except failures() as error:
        if name not in problem.peers:
            raise
        raise Unavailable(f"fails: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}") from error
    if name == FLOOR:
        return call, {}
    if outputs.keys() != oracle.keys():
        raise CheckFailed(f"{name} returns {sorted(outputs)}, the oracle {sorted(oracle)}")
    errors = {each: relative_error(value, oracle[each]) for each, value in outputs.items()}
    wrong = [f"{each} errs by {error:.1e}" for each, error in errors.items() if not error <= call.tolerance]
    if wrong:
        message = f"{name}: {', '.join(wrong)}, more than {call.tolerance:.0e}"
        raise Unavailable(message) if name in problem.peers else CheckFailed(message)
    return call, errors


def measure(case: Case, device: str, *, names: Sequence[str] | None = None, rounds: int = 9) -> dict[str, Any]:
    """Check, time in turn, and measure the peak memory of a case's arms."""
    problem = case.problem(device)
    oracle = problem.oracle()
    calls: dict[str, Call] = {}
    result: dict[str, Any] = {"op": case.op, "flops": problem.flops, "bytes": problem.moved, "arms": {}, "skipped": {}}
    for name in (name for name in problem.arms if names is None or name in names):
        try:
            calls[name], errors = prepared(problem, name, oracle)
            result["arms"][name] = {"errors": errors, "note": calls[name].note}
        except (Unavailable, torch.OutOfMemoryError) as error:
            result["skipped"][name] = str(error).split("\n")[0]
    clock = clock_of(device)
    samples = alternate({name: lambda call=call: clock(call.run) for name, call in calls.items()}, rounds=rounds)
    for name, seconds in samples.items():
        row = result["arms"][name] | {"seconds": seconds, "peak_mib": peak_mib(calls[name])}
        middle = median(seconds)
        row |= {"tflop_s": problem.flops / middle / 1e12, "gb_s": problem.moved / middle / 1e9}
        if FLOOR in samples:
            row["times_floor"] = ratio(seconds, samples[FLOOR])
        result["arms"][name] = row
    return result


def peak_mib(call: Call) -> float | None:
    """Peak of one call beyond what was held and beyond its results."""
    peak = PeakMemory()
    outputs = call.run()
    found = peak.mib()
    return None if found is None else found - sum(each.numel() * each.element_size() for each in outputs.values()) / MIB
