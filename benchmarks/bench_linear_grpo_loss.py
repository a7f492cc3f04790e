"""`linear_grpo_loss`, forward and backward, against its GEMMs alone, eager code and peers.

    python -m benchmarks.bench_linear_grpo_loss                     arms in turn, ratios, memory, table and file
    pytest benchmarks/bench_linear_grpo_loss.py --benchmark-only    pytest-benchmark, CPU

The floor is the three (frozen head: two) GEMMs of the case by torch.mm, unchunked, in the same dtype.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from torch import Tensor

from benchmarks import loss_arms, op
from benchmarks.compare import Arm, Outputs, implementations_of
from benchmarks.head import SETTINGS, Case, HeadProblem
from benchmarks.peers import liger
from vlmr1_kernels import linear_grpo_loss
from vlmr1_kernels.registry import implementations


class Problem(HeadProblem):
    def arms(self) -> Mapping[str, Callable[[], Arm]]:
        inputs, case = self.inputs, self.case

        def finish(log_probs: loss_arms.LogProb) -> Callable[[], Outputs]:
            return loss_arms.loss_and_gradients(inputs, loss_arms.loss_of(inputs, log_probs))

        def compiled() -> Arm:
            loss = loss_arms.compiled(loss_arms.loss_of(inputs, loss_arms.plain_log_probs))
            return loss_arms.compiled_arm(inputs, loss_arms.loss_and_gradients(inputs, loss))

        def peer(make: Callable[..., Any], note: str) -> Callable[[], Arm]:
            return lambda: Arm(loss_arms.loss_and_gradients(inputs, make(inputs)), case.loose, note, peer=True)

        return {
            "floor": lambda: Arm(inputs.floor),
            **implementations_of("linear_grpo_loss", self.ours),
            **loss_arms.log_prob_arms(inputs, finish),
            "compile": compiled,
            "liger": peer(liger.fused_linear, liger.FUSED_NOTE),
            "liger-logits": peer(liger.on_logits, liger.LOGITS_NOTE),
        }

    def ours(self, impl: str) -> Arm:
        inputs = self.inputs
        rows = (inputs.targets, inputs.seq_ids, inputs.advantages)
        old, ref = inputs.old_logp, inputs.ref_logp

        def loss(hidden: Tensor, weight: Tensor) -> Tensor:
            head = (hidden, weight)
            return linear_grpo_loss(*head, *rows, old_logp=old, ref_logp=ref, settings=SETTINGS, impl=impl)[0]

        return Arm(loss_arms.loss_and_gradients(inputs, loss), self.case.tolerance)

    def oracle(self) -> Outputs:
        inputs = self.inputs
        old, ref = inputs.padded(inputs.old_logp), inputs.padded(inputs.ref_logp)

        def part_loss(logp: Tensor, part: slice) -> Tensor:
            some = slice(part.start // inputs.length, part.stop // inputs.length)  # whole sequences
            logp = logp.view(-1, inputs.length)
            losses = loss_arms.objective(logp, old[some], ref[some], inputs.advantages[some])
            return losses.sum() / self.case.sequences

        return inputs.oracle(part_loss, keep_logp=False)


BENCH = op.Bench(
    "linear_grpo_loss",
    {
        "cpu": [
            f"{shape}-{dtype}-{mode}"
            for shape in ("512x256x8192", "256x1024x151936")
            for dtype in ("float32", "bfloat16")
            for mode in ("trainable", "frozen")
        ],
        "cuda": [
            f"{shape}-bfloat16-{mode}"
            for shape in ("8192x2048x151936", "16384x3584x152064")
            for mode in ("trainable", "frozen")
        ],
    },
    lambda text, device: Problem(Case.parse(text, device)),
)


@pytest.mark.parametrize("name", ("floor", *implementations("linear_grpo_loss"), "eager"))
@pytest.mark.parametrize("case", BENCH.cases["cpu"])
def test_linear_grpo_loss(benchmark: Any, case: str, name: str) -> None:
    op.check_and_benchmark(benchmark, BENCH, case, name)


def main(arguments: Sequence[str] | None = None) -> int:
    return op.main(BENCH, arguments)


if __name__ == "__main__":
    sys.exit(main())
