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
from benchmarks.op_attention import decode, rope, shared_prefix, varlen
from benchmarks.op_calls import FLOOR, Call, Outputs, Problem, Unavailable, failures
from benchmarks.op_head import advantages, grpo, linear_grpo, linear_logp
from benchmarks.op_sampling import sampling
from vlmr1_kernels import ImplementationError
from vlmr1_kernels.testing import relative_error


@dataclass(frozen=True)
class Case:
    """A row of the table: an op, its shape as the builder takes it, the dtype, and the mode of a head."""

    op: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    mode: str = ""

    @classmethod
    def parse(cls, name: str) -> Case:
        """Return the case of a name: op, shape, dtype and mode, joined by "-"."""
        op, shape, *more = name.split("-")
        return cls(op, tuple(map(int, shape.split("x"))), *more)

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
    "sample_tokens": sampling,  # S, V
    "shared_prefix_decode": decode,  # groups, branches, prefix, suffix, H, Hkv, Dh
    "rope_kv_write": rope,  # tokens, H, Hkv, Dh
}
LARGE = ((8192, 2048, 151936), (16384, 3584, 152064))
# Names of cases by device; those of cuda in the order of what decides most.
CASES = {
    "tiny": """
linear_grpo_loss-128x192x490-float32-trainable linear_grpo_loss-128x192x490-float32-frozen
linear_logprob-128x192x490-float32-no_grad grpo_loss-128x8-float32 group_advantages-8x4-float32
shared_prefix_attention-2x41x4x16x6x2x32-float32 varlen_attention-4x16x4x4x32-float32
shared_prefix_decode-2x4x41x16x6x2x32-float32 rope_kv_write-8x6x2x32-float32 sample_tokens-8x490-float32""",
    "cpu": """
linear_grpo_loss-512x256x8192-float32-trainable linear_grpo_loss-512x256x8192-bfloat16-trainable
linear_grpo_loss-512x256x8192-float32-frozen linear_grpo_loss-512x256x8192-bfloat16-frozen
linear_grpo_loss-256x1024x151936-float32-trainable linear_grpo_loss-256x1024x151936-bfloat16-trainable
linear_grpo_loss-256x1024x151936-float32-frozen linear_grpo_loss-256x1024x151936-bfloat16-frozen
linear_logprob-512x256x8192-float32-no_grad linear_logprob-512x256x8192-float32-trainable
grpo_loss-8192x64-float32 grpo_loss-262144x512-float32 group_advantages-64x8-float32 group_advantages-65536x8-float32
shared_prefix_attention-1x298x8x64x16x2x64-float32 shared_prefix_attention-2x298x8x64x16x2x64-bfloat16
shared_prefix_attention-8x64x8x64x4x4x32-float32 varlen_attention-16x64x4x4x64-float32
varlen_attention-16x64x16x16x80-float32 shared_prefix_decode-1x8x300x64x16x2x64-float32
shared_prefix_decode-8x8x300x64x4x2x64-float32 rope_kv_write-64x16x2x64-float32 sample_tokens-16x8192-float32""",
    "cuda": """
linear_grpo_loss-8192x2048x151936-bfloat16-trainable linear_grpo_loss-8192x2048x151936-bfloat16-frozen
linear_grpo_loss-16384x3584x152064-bfloat16-trainable linear_grpo_loss-16384x3584x152064-bfloat16-frozen
linear_logprob-8192x2048x151936-bfloat16-no_grad shared_prefix_decode-8x8x1200x256x16x2x128-bfloat16
shared_prefix_decode-2x8x1200x2000x16x2x128-bfloat16 shared_prefix_attention-5x1200x8x255x16x2x128-bfloat16
shared_prefix_attention-8x100x8x48x6x2x32-float32 varlen_attention-128x64x16x16x80-bfloat16
varlen_attention-4x4096x16x16x80-bfloat16 shared_prefix_decode-8x16x4096x256x28x4x128-bfloat16
sample_tokens-64x151936-float32 rope_kv_write-64x16x2x128-bfloat16
grpo_loss-16384x64-float32 group_advantages-64x8-float32""",
}


def cases(device: str) -> list[Case]:
    return [Case.parse(name) for name in CASES[device].split()]


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
