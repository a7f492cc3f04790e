"""`linear_logprob`, without gradient (old and reference log-probs) and with it, against GEMMs, eager code and peers.

    python -m benchmarks.bench_linear_logprob                     arms in turn, ratios, memory, table and file
    pytest benchmarks/bench_linear_logprob.py --benchmark-only    pytest-benchmark, CPU

The floor is one GEMM without gradient, three with (frozen head: two); an op that keeps no logits projects once
more in backward.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from torch import Tensor

from benchmarks import loss_arms, op
from benchmarks.compare import Arm, Outputs, implementations_of
from benchmarks.head import Case, HeadProblem
from vlmr1_kernels import linear_logprob
from vlmr1_kernels.registry import implementations


class Problem(HeadProblem):
    def arms(self) -> Mapping[str, Callable[[], Arm]]:
        inputs = self.inputs

        def finish(log_probs: loss_arms.LogProb) -> Callable[[], Outputs]:
            return loss_arms.log_probs_and_gradients(inputs, log_probs)

        return {
            "floor": lambda: Arm(inputs.floor),
            **implementations_of("linear_logprob", self.ours),
            **loss_arms.log_prob_arms(inputs, finish),
            "compile": lambda: loss_arms.compiled_arm(inputs, finish(loss_arms.compiled(loss_arms.plain_log_probs))),
        }

    def ours(self, impl: str) -> Arm:
        def log_probs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
            logp = linear_logprob(hidden, weight, targets, impl=impl)
            assert isinstance(logp, Tensor)
            return logp

        return Arm(loss_arms.log_probs_and_gradients(self.inputs, log_probs), self.case.tolerance)

    def oracle(self) -> Outputs:
        upstream = self.inputs.upstream
        return self.inputs.oracle(lambda logp, part: logp @ upstream[part].to(logp.dtype), keep_logp=True)


BENCH = op.Bench(
    "linear_logprob",
    {
        "cpu": [
            f"{shape}-{dtype}-{mode}"
            for shape, mode in (
                ("512x256x8192", "no_grad"),
                ("512x256x8192", "trainable"),
                ("256x1024x151936", "no_grad"),
            )
            for dtype in ("float32", "bfloat16")
        ],
        "cuda": [
            f"{shape}-bfloat16-{mode}"
            for shape in ("8192x2048x151936", "16384x3584x152064")
            for mode in ("no_grad", "trainable")
        ],
    },
    lambda text, device: Problem(Case.parse(text, device)),
)


@pytest.mark.parametrize("name", ("floor", *implementations("linear_logprob"), "eager"))
@pytest.mark.parametrize("case", BENCH.cases["cpu"])
def test_linear_logprob(benchmark: Any, case: str, name: str) -> None:
    op.check_and_benchmark(benchmark, BENCH, case, name)


def main(arguments: Sequence[str] | None = None) -> int:
    return op.main(BENCH, arguments)


if __name__ == "__main__":
    sys.exit(main())
