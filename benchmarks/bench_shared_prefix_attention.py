"""`shared_prefix_attention`, forward and backward, against SDPA on sequences that repeat their prompt.

    python -m benchmarks.bench_shared_prefix_attention                     arms in turn, ratios, memory, table and file
    pytest benchmarks/bench_shared_prefix_attention.py --benchmark-only    pytest-benchmark, CPU

A case is groups x prompt rows x branches x branch rows, then H x Hkv x Dh and the dtype.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import op
from benchmarks.attention import TOLERANCE, Inputs, Shape
from benchmarks.compare import Arm, Outputs, implementations_of
from vlmr1_kernels import PrefixLayout, shared_prefix_attention
from vlmr1_kernels.registry import implementations


class Problem:
    """ "2x298x8x64-16x2x128-bfloat16"."""

    accumulator = 0

    def __init__(self, groups: int, prompt: int, branches: int, length: int, shape: Shape, device: str):
        self.sizes, self.shape, self.device, self.dtype = (groups, prompt, branches, length), shape, device, shape.dtype
        self.layout = PrefixLayout((prompt,) * groups, ((length,) * branches,) * groups)
        pairs = prompt * (prompt + 1) // 2 + branches * (length * prompt + length * (length + 1) // 2)
        self.flops = shape.flops(groups * pairs)
        self.moved = shape.moved(self.layout.total_length)
        self.inputs = Inputs(shape, self.layout.total_length, device)
        self.rows, self.back = (each.to(device) for each in repetition(*self.sizes))

    @classmethod
    def parse(cls, text: str, device: str) -> Problem:
        sizes, heads, dtype = text.split("-")
        groups, prompt, branches, length = (int(each) for each in sizes.split("x"))
        return cls(groups, prompt, branches, length, Shape.parse(heads, dtype), device)

    def tiny(self) -> Problem:
        return Problem(1, 8, 2, 4, self.shape, self.device)

    def arms(self) -> Mapping[str, Callable[[], Arm]]:
        return {
            "floor": lambda: Arm(self.inputs.floor(self.flops)),
            **implementations_of("shared_prefix_attention", self.ours),
            "eager": self.eager,
        }

    def ours(self, impl: str) -> Arm:
        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return shared_prefix_attention(q, k, v, self.layout, impl=impl)

        scores = 6 * 4 * self.shape.heads * self.layout.total_length**2  # all of them, in float32, a few times
        needs, compiled = scores if impl == "reference" else 0, impl == "flex"
        return Arm(lambda: self.inputs.run(attention), TOLERANCE[self.dtype], needs=needs, compiled=compiled)

    def eager(self) -> Arm:
        note = "SDPA, causal, on prompt + branch; making the copies and summing their gradients included"
        return Arm(lambda: self.inputs.run(self.repeated), TOLERANCE[self.dtype], note=note)

    def repeated(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        _, prompt, _, length = self.sizes
        queries, keys, values = (
            x[0].index_select(1, self.rows).unflatten(1, (-1, prompt + length)).transpose(0, 1) for x in (q, k, v)
        )  # [B, H, prompt + branch, Dh]
        grouped = q.shape[1] != k.shape[1]
        out = scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=grouped)
        return out.transpose(0, 1).flatten(1, 2).index_select(1, self.back)[None]

    def oracle(self) -> Outputs:
        return self.inputs.run(self.repeated, torch.float64)


def repetition(groups: int, prompt: int, branches: int, length: int) -> tuple[Tensor, Tensor]:
    """The packed row of each row of the repeated sequences; and where each packed row is among those."""
    prompts = torch.arange(groups * prompt).view(groups, 1, prompt).expand(-1, branches, -1)
    own = groups * prompt + torch.arange(groups * branches * length).view(groups, branches, length)
    rows = torch.cat([prompts, own], dim=2).flatten()
    places = torch.arange(len(rows)).view(groups, branches, prompt + length)
    return rows, torch.cat([places[:, 0, :prompt].flatten(), places[:, :, prompt:].flatten()])


BENCH = op.Bench(
    "shared_prefix_attention",
    {
        "cpu": ["1x298x8x64-16x2x64-float32", "2x298x8x64-16x2x64-bfloat16", "8x64x8x64-4x4x32-float32"],
        "cuda": ["1x1024x8x512-16x2x128-bfloat16", "8x512x8x128-16x2x128-bfloat16", "1x1024x8x256-16x2x128-float32"],
    },
    Problem.parse,
)


@pytest.mark.parametrize("name", ("floor", *implementations("shared_prefix_attention"), "eager"))
@pytest.mark.parametrize("case", BENCH.cases["cpu"])
def test_shared_prefix_attention(benchmark: Any, case: str, name: str) -> None:
    op.check_and_benchmark(benchmark, BENCH, case, name)


def main(arguments: Sequence[str] | None = None) -> int:
    return op.main(BENCH, arguments)


if __name__ == "__main__":
    sys.exit(main())
