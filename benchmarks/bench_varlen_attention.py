"""`varlen_attention`, forward and backward, against a loop of SDPA calls, as vision towers have it.

    python -m benchmarks.bench_varlen_attention                     arms in turn, ratios, memory, table and file
    pytest benchmarks/bench_varlen_attention.py --benchmark-only    pytest-benchmark, CPU

A case is sequences x rows of each, joined by +, then H x Hkv x Dh and the dtype.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import op
from benchmarks.attention import TOLERANCE, Inputs, Shape
from benchmarks.compare import Arm, Outputs, implementations_of
from vlmr1_kernels import varlen_attention
from vlmr1_kernels.registry import implementations


class Problem:
    """ "14x64+2x32-16x16x80-bfloat16"."""

    accumulator = 0

    def __init__(self, lengths: Sequence[int], shape: Shape, device: str):
        self.lengths, self.shape, self.device, self.dtype = lengths, shape, device, shape.dtype
        self.flops = shape.flops(sum(length * length for length in lengths))
        self.moved = shape.moved(sum(lengths))
        self.inputs = Inputs(shape, sum(lengths), device)
        self.cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)

    @classmethod
    def parse(cls, text: str, device: str) -> Problem:
        sequences, heads, dtype = text.split("-")
        runs = [[int(each) for each in run.split("x")] for run in sequences.split("+")]
        return cls([length for count, length in runs for _ in range(count)], Shape.parse(heads, dtype), device)

    def tiny(self) -> Problem:
        return Problem([4, 3], self.shape, self.device)

    def arms(self) -> Mapping[str, Callable[[], Arm]]:
        return {
            "floor": lambda: Arm(self.inputs.floor(self.flops)),
            **implementations_of("varlen_attention", self.ours),
            "eager": lambda: Arm(lambda: self.inputs.run(self.loop), TOLERANCE[self.dtype], "a loop of SDPA calls"),
        }

    def ours(self, impl: str) -> Arm:
        longest = max(self.lengths)

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return varlen_attention(q, k, v, self.cu_seqlens, longest, impl=impl)

        scores = 6 * 4 * self.shape.heads * sum(self.lengths) ** 2  # all of them, in float32, a few times
        needs = scores if impl == "reference" else 0
        return Arm(lambda: self.inputs.run(attention), TOLERANCE[self.dtype], needs=needs)

    def loop(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        lengths = self.cu_seqlens.diff().tolist()
        parts = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
        grouped = q.shape[1] != k.shape[1]
        outs = [scaled_dot_product_attention(*part, enable_gqa=grouped).transpose(1, 2) for part in parts]
        return torch.cat(outs, dim=1).transpose(1, 2)

    def oracle(self) -> Outputs:
        return self.inputs.run(self.loop, torch.float64)


BENCH = op.Bench(
    "varlen_attention",
    {
        "cpu": ["16x64-4x4x64-float32", "7x64+1x32+7x64+1x32-16x16x80-float32", "16x64-16x16x80-bfloat16"],
        "cuda": ["128x64-16x16x80-bfloat16", "4x4096-16x16x80-bfloat16", "128x64-16x16x80-float32"],
    },
    Problem.parse,
)


@pytest.mark.parametrize("name", ("floor", *implementations("varlen_attention"), "eager"))
@pytest.mark.parametrize("case", BENCH.cases["cpu"])
def test_varlen_attention(benchmark: Any, case: str, name: str) -> None:
    op.check_and_benchmark(benchmark, BENCH, case, name)


def main(arguments: Sequence[str] | None = None) -> int:
    return op.main(BENCH, arguments)


if __name__ == "__main__":
    sys.exit(main())
