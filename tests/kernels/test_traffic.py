"""Bytes that the GPU's `linear_grpo_loss` moves and holds, counted on tensors without data; nothing is computed."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.traffic import Traffic
from vlmr1.planner.cuda_ops import head_loss
from vlmr1_kernels import GRPOSettings, linear
from vlmr1_kernels.inputs import HeadInputs, LossInputs

pytest.importorskip("triton")
from tests.helpers.resources import loss_call, meta
from vlmr1_kernels.triton import grpo_loss, head, linear_grpo_loss, sequences

GB = 1e9
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True, scope="module")
def _operands_as_on_cuda_and_no_launches() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "gemm_operand", lambda matrix: matrix)
        patch.setattr(head, "launch_options", lambda *_: {})
        for module in (head, grpo_loss, sequences):
            patch.setattr(module, "launch", lambda *args, **constants: None)
        yield


class OnCuda:
    """Shape and dtype of a tensor that a GPU would hold."""

    device = torch.device("cuda")

    def __init__(self, *shape: int, dtype: torch.dtype, requires_grad: bool = True):
        self.shape, self.dtype, self.requires_grad = shape, dtype, requires_grad


def forward(rows: int, dim: int, vocab: int, weight: torch.dtype) -> Traffic:
    hidden, head = OnCuda(rows, dim, dtype=BF16), OnCuda(vocab, dim, dtype=weight)
    chunks = linear.chunk_rows(hidden, head, None)  # type: ignore[arg-type]
    run = loss_call(GRPOSettings(), rows=rows, dim=dim, vocabulary=vocab, weight_dtype=weight, chunks=chunks)
    with Traffic() as traffic:
        run()
    return traffic


def backward(hidden: Tensor, leaf: Tensor, accumulate: bool) -> Traffic:
    """Backward of a pack that is not the first one of its update."""
    leaf.grad = torch.empty_like(leaf)
    ids = meta(len(hidden), dtype=torch.int64)
    head, inputs = HeadInputs(hidden, leaf, None, ids, 1.0, None), LossInputs(ids, meta(64), *[None] * 6)
    options: dict[str, Any] = {"chunk_mib": None, "active_rows": None, "accumulate_grad": accumulate}
    loss, _ = linear_grpo_loss.linear_grpo_loss(head, inputs, settings=GRPOSettings(), **options)
    with Traffic() as traffic:
        loss.backward()
    return traffic


# Of a step with a trained head: GB of its float32 sums in matrix products, GB of tensors of its size in all other ops,
# GB allocated at the peak of forward, matrix products of forward. Where each chunk is consumed on
# its own the sums are 18.7 GB for the small shape and 67.6 GB for the large one.
SMALL, LARGE = (8192, 2048, 151_936), (16_384, 3584, 152_064)
LIMITS: dict[str, tuple[tuple[int, int, int], torch.dtype, bool, float, float, float, int]] = {
    "bfloat16": (SMALL, BF16, False, 0.0, 3.2, 3.2, 10),
    "float32": (SMALL, FP32, False, 3.8, 8.1, 3.9, 12),
    "float32, accumulated": (SMALL, FP32, True, 3.8, 5.7, 3.9, 12),
    "bfloat16, large": (LARGE, BF16, False, 15.3, 8.8, 4.3, 24),
    "float32, accumulated, large": (LARGE, FP32, True, 15.3, 9.9, 5.4, 24),
}


@pytest.mark.parametrize(
    ("shape", "weight", "accumulate", "sums", "others", "peak", "products"), LIMITS.values(), ids=LIMITS.keys()
)
def test_bytes_of_a_step_are_within_limits(
    shape: tuple[int, int, int], weight: torch.dtype, accumulate: bool, sums: float, others: float, peak: float,
    products: int,
) -> None:  # fmt: skip
    rows, dim, vocab = shape
    hidden, leaf = meta(rows, dim, dtype=BF16).requires_grad_(), meta(vocab, dim, dtype=weight).requires_grad_()
    first, last = forward(*shape, weight), backward(hidden, leaf, accumulate)
    size = dim * vocab
    found = {
        "float32 sums": first.gemm_bytes(size, FP32) / GB,
        "others": (first.other_bytes(size, BF16, FP32) + last.other_bytes(size, BF16, FP32)) / GB,
        "peak": first.peak / GB,
        "products": sum(op.name in ("mm", "addmm") for op in first.ops),
    }
    limits = {"float32 sums": sums, "others": others, "peak": peak, "products": products}
    assert {name: value for name, value in found.items() if value > limits[name]} == {}
    assert {name: limits[name] for name, value in found.items() if value < 0.9 * limits[name]} == {}, "lower these"
    with Traffic() as planned:
        head_loss(hidden, leaf)
    assert planned.peak == pytest.approx(first.peak, rel=0.02), "what `vlmr1 plan` counts"
