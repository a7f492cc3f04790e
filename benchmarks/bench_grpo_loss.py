"""`grpo_loss` on given log-probs, forward and backward, against a copy of as many bytes, eager code and a compiler.

    python -m benchmarks.bench_grpo_loss                     arms in turn, ratios, table and file
    pytest benchmarks/bench_grpo_loss.py --benchmark-only    pytest-benchmark, CPU

Peers that start from logits are arms of `bench_linear_grpo_loss`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import pytest
import torch
from torch import Tensor

from benchmarks import loss_arms, op
from benchmarks.compare import Arm, Outputs, implementations_of
from benchmarks.head import SETTINGS
from vlmr1_kernels import grpo_loss
from vlmr1_kernels.registry import implementations


class Problem:
    """ "8192x64": N rows in B sequences of one length, float32."""

    dtype, flops, accumulator = torch.float32, 0, 0

    def __init__(self, rows: int, sequences: int, device: str):
        self.rows, self.sequences, self.device = rows, sequences, device
        self.moved = 24 * rows + 4 * sequences  # three log-probs and the gradient, int64 sequence, advantages
        generator = torch.Generator(device).manual_seed(3)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, generator=generator)

        self.logp = (-3 * normal(rows).abs()).requires_grad_()  # [N]
        self.old, self.ref = self.logp.detach() + 0.2 * normal(rows), self.logp.detach() + 0.2 * normal(rows)
        self.advantages = normal(sequences) + 0.5  # [B]
        self.seq_ids = torch.arange(sequences, device=device).repeat_interleave(rows // sequences)

    @classmethod
    def parse(cls, text: str, device: str) -> Self:
        rows, sequences = (int(each) for each in text.split("x"))
        if rows % sequences:
            raise ValueError(f"case is {text!r}; it must be NxB, N a multiple of B")
        return cls(rows, sequences, device)

    def tiny(self) -> Self:
        return type(self)(24, 8, self.device)

    def arms(self) -> Mapping[str, Callable[[], Arm]]:
        return {
            "floor": lambda: Arm(self.copy()),
            **implementations_of("grpo_loss", self.ours),
            "eager": lambda: Arm(self.run(self.padded), 1e-4, "the objective on [B, L] in torch"),
            "compile": lambda: Arm(self.run(loss_arms.compiled(self.padded)), 1e-4, peer=True, compiled=True),
        }

    def copy(self) -> Callable[[], Outputs]:
        source = torch.randn(self.moved // 8, device=self.device)  # read and written: half of the bytes
        return lambda: {"copy": source.clone()}

    def run(self, loss: Callable[[Tensor], Tensor]) -> Callable[[], Outputs]:
        def run() -> Outputs:
            value = loss(self.logp)
            return {"loss": value.detach(), "d_logp": torch.autograd.grad(value, self.logp)[0]}

        return run

    def ours(self, impl: str) -> Arm:
        def loss(logp: Tensor) -> Tensor:
            given = (logp, self.seq_ids, self.advantages)
            return grpo_loss(*given, old_logp=self.old, ref_logp=self.ref, settings=SETTINGS, impl=impl)[0]

        return Arm(self.run(loss), 1e-4)

    def padded(self, logp: Tensor) -> Tensor:
        def pad(rows: Tensor) -> Tensor:
            return rows.to(logp.dtype).view(self.sequences, -1)  # [B, L]

        return loss_arms.objective(pad(logp), pad(self.old), pad(self.ref), self.advantages.to(logp.dtype)).mean()

    def oracle(self) -> Outputs:
        wide = self.logp.detach().double().requires_grad_()
        value = self.padded(wide)
        return {"loss": value.detach(), "d_logp": torch.autograd.grad(value, wide)[0]}


BENCH = op.Bench(
    "grpo_loss",
    {"cpu": ["8192x64", "262144x512"], "cuda": ["8192x64", "16384x64", "1048576x4096"]},
    Problem.parse,
    memory=False,
)


@pytest.mark.parametrize("name", ("floor", *implementations("grpo_loss"), "eager"))
@pytest.mark.parametrize("case", BENCH.cases["cpu"])
def test_grpo_loss(benchmark: Any, case: str, name: str) -> None:
    op.check_and_benchmark(benchmark, BENCH, case, name, rounds=50)


def main(arguments: Sequence[str] | None = None) -> int:
    return op.main(BENCH, arguments)


if __name__ == "__main__":
    sys.exit(main())
