"""`shared_prefix_decode`, one step of one layer, against SDPA over a cache in which every branch repeats its prefix.

    python -m benchmarks.bench_shared_prefix_decode                     arms in turn, ratios, table and file
    pytest benchmarks/bench_shared_prefix_decode.py --benchmark-only    pytest-benchmark, CPU

A case is groups x branches x prefix x suffix, then H x Hkv x Dh and the dtype. The floor copies as many bytes as
the step must read and write.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import op
from benchmarks.attention import TOLERANCE, Shape
from benchmarks.compare import Arm, Outputs, implementations_of
from benchmarks.harness import MIB
from vlmr1_kernels import shared_prefix_decode
from vlmr1_kernels.registry import implementations

BLOCK = 16


class Problem:
    """ "8x8x1024x128-16x2x128-bfloat16"; prefixes behind one another in the pool, blocks of suffixes shuffled."""

    accumulator = 0

    def __init__(self, groups: int, branches: int, prefix: int, suffix: int, shape: Shape, device: str):
        self.sizes, self.shape, self.device, self.dtype = (groups, branches, prefix, suffix), shape, device, shape.dtype
        batch, blocks = groups * branches, -(-suffix // BLOCK)
        first = -(-groups * prefix // BLOCK)  # block behind the prefixes
        generator = torch.Generator(device).manual_seed(3)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, device=device, generator=generator).to(shape.dtype)

        def int32(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        self.q = normal(batch, shape.heads, shape.head_dim)
        self.keys, self.values = normal(2, shape.kv_heads, BLOCK * (first + batch * blocks), shape.head_dim)
        order = first + torch.randperm(batch * blocks, device=device, generator=generator).view(batch, blocks)
        self.tables = (
            int32(range(0, batch + 1, branches)),
            int32(range(0, groups * prefix, prefix)),
            int32([prefix] * groups),
            order.int(),
            int32([suffix] * batch),
        )
        head = shape.head_dim * shape.dtype.itemsize
        rows = groups * prefix + batch * suffix  # that hold keys and values
        self.moved = head * (2 * shape.kv_heads * rows + 2 * shape.heads * batch)
        self.repeated = head * 2 * shape.kv_heads * batch * (prefix + suffix)
        self.flops = 2 * 2 * shape.heads * shape.head_dim * batch * (prefix + suffix)

    @classmethod
    def parse(cls, text: str, device: str) -> Self:
        sizes, heads, dtype = text.split("-")
        groups, branches, prefix, suffix = (int(each) for each in sizes.split("x"))
        return cls(groups, branches, prefix, suffix, Shape.parse(heads, dtype), device)

    def tiny(self) -> Self:
        return type(self)(1, 2, 8, 4, self.shape, self.device)

    def arms(self) -> Mapping[str, Callable[[], Arm]]:
        arms = {"floor": self.floor, **implementations_of("shared_prefix_decode", self.ours), "eager": self.eager}
        return arms | {"graph": self.graph} if self.device == "cuda" else arms

    def floor(self) -> Arm:
        source = torch.randint(256, (self.moved // 2,), dtype=torch.uint8, device=self.device)  # zeros are faster
        return Arm(lambda: {"copy": source.clone()})

    def step(self, impl: str) -> Outputs:
        _, branches, prefix, _ = self.sizes
        bounds = {"max_group": branches, "max_prefix": prefix}
        out = shared_prefix_decode(self.q, self.keys, self.values, *self.tables, block=BLOCK, **bounds, impl=impl)
        return {"out": out}

    def ours(self, impl: str) -> Arm:
        return Arm(lambda: self.step(impl), TOLERANCE[self.dtype])

    def graph(self) -> Arm:
        self.step("triton")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self.step("triton")

        def replay() -> Outputs:
            graph.replay()
            return outputs

        return Arm(replay, TOLERANCE[self.dtype], note="triton, launched from a CUDA graph")

    def eager(self) -> Arm:
        keys, values = (self.own(pool) for pool in (self.keys, self.values))
        note = f"SDPA; its cache is there already: {self.repeated / MIB:.1f} MiB that a step reads"
        return Arm(lambda: {"out": sdpa(self.q, keys, values)}, TOLERANCE[self.dtype], note=note, needs=self.repeated)

    def own(self, pool: Tensor) -> Tensor:
        """[Hkv, R, Dh] -> [B, Hkv, prefix + suffix, Dh], every branch's own rows."""
        _, branches, prefix, suffix = self.sizes
        _, starts, _, blocks, _ = self.tables
        time = torch.arange(max(prefix, suffix), device=self.device)
        prompts = (starts[:, None] + time[:prefix]).repeat_interleave(branches, 0)
        suffixes = blocks[:, time[:suffix] // BLOCK] * BLOCK + time[:suffix] % BLOCK
        return pool[:, torch.cat([prompts, suffixes], dim=1)].transpose(0, 1).contiguous()

    def oracle(self) -> Outputs:
        return {"out": sdpa(self.q.double(), self.own(self.keys.double()), self.own(self.values.double()))}


def sdpa(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    grouped = q.shape[1] != keys.shape[1]
    return scaled_dot_product_attention(q[:, :, None], keys, values, enable_gqa=grouped)[:, :, 0]


BENCH = op.Bench(
    "shared_prefix_decode",
    {
        "cpu": ["1x8x300x64-16x2x64-float32", "8x8x300x64-4x2x64-float32", "1x8x300x64-16x2x128-bfloat16"],
        "cuda": [
            "1x8x1024x128-16x2x128-bfloat16",
            "8x8x1024x256-16x2x128-bfloat16",
            "32x8x1024x256-16x2x128-bfloat16",
            "8x16x4096x256-28x4x128-bfloat16",
            "8x8x1024x256-16x16x80-bfloat16",
            "8x8x1024x256-16x2x128-float32",
        ],
    },
    Problem.parse,
    memory=False,
)


@pytest.mark.parametrize("name", ("floor", *implementations("shared_prefix_decode"), "eager"))
@pytest.mark.parametrize("case", BENCH.cases["cpu"])
def test_shared_prefix_decode(benchmark: Any, case: str, name: str) -> None:
    op.check_and_benchmark(benchmark, BENCH, case, name, rounds=50)


def main(arguments: Sequence[str] | None = None) -> int:
    return op.main(BENCH, arguments)


if __name__ == "__main__":
    sys.exit(main())
