"""`group_advantages`: a few launches over a few numbers, against a copy of them and eager code.

python -m benchmarks.bench_group_advantages                     arms in turn, ratios, table and file
pytest benchmarks/bench_group_advantages.py --benchmark-only    pytest-benchmark, CPU
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import pytest
import torch
from torch import Tensor

from benchmarks import op
from benchmarks.compare import Arm, Outputs, implementations_of
from vlmr1_kernels import group_advantages
from vlmr1_kernels.registry import implementations


def eager(rewards: Tensor, size: int) -> Tensor:
    """Mean and std of each group, repeated for its members, as trainers write it."""
    groups = rewards.view(-1, size)
    mean, std = (each.repeat_interleave(size) for each in (groups.mean(1), groups.std(1)))
    return (rewards - mean) / (std + 1e-4)


class Problem:
    """ "64x8": B rewards in groups of G, float32."""

    dtype, flops, accumulator = torch.float32, 0, 0

    def __init__(self, rewards: int, size: int, device: str):
        self.size, self.device = size, device
        self.moved = 8 * rewards
        self.rewards = torch.rand(rewards, device=device, generator=torch.Generator(device).manual_seed(3))  # [B]

    @classmethod
    def parse(cls, text: str, device: str) -> Self:
        rewards, size = (int(each) for each in text.split("x"))
        return cls(rewards, size, device)

    def tiny(self) -> Self:
        return type(self)(2 * self.size, self.size, self.device)

    def arms(self) -> Mapping[str, Callable[[], Arm]]:
        return {
            "floor": lambda: Arm(lambda: {"copy": self.rewards.clone()}),
            **implementations_of("group_advantages", self.ours),
            "eager": lambda: Arm(lambda: {"advantages": eager(self.rewards, self.size)}, 1e-5),
        }

    def ours(self, impl: str) -> Arm:
        return Arm(lambda: {"advantages": group_advantages(self.rewards, self.size, impl=impl)}, 1e-5)

    def oracle(self) -> Outputs:
        return {"advantages": eager(self.rewards.double(), self.size)}


BENCH = op.Bench(
    "group_advantages",
    {"cpu": ["64x8", "65536x8"], "cuda": ["64x8", "65536x8"]},
    Problem.parse,
    memory=False,
)


@pytest.mark.parametrize("name", ("floor", *implementations("group_advantages"), "eager"))
@pytest.mark.parametrize("case", BENCH.cases["cpu"])
def test_group_advantages(benchmark: Any, case: str, name: str) -> None:
    op.check_and_benchmark(benchmark, BENCH, case, name, rounds=50)


def main(arguments: Sequence[str] | None = None) -> int:
    return op.main(BENCH, arguments)


if __name__ == "__main__":
    sys.exit(main())
