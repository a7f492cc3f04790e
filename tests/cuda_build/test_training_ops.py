"""Ops of a training step on CUDA tensors without data: aten's shapes, dtypes and strides, and no wait."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from tests.cuda_build.harness import OnCuda, fake_cuda, on_stub
from vlmr1_kernels import GRPOSettings, PrefixLayout, linear_grpo_loss, shared_prefix_attention, varlen_attention

CUDA = torch.device("cuda")
BF16, FP32 = torch.bfloat16, torch.float32
LAYOUTS = {
    "branches": PrefixLayout((1200,) * 5, ((255,) * 8,) * 5),
    "prompts alone": PrefixLayout((1200, 7), ((), ())),
    "a prompt without branches": PrefixLayout((1200, 7), ((255, 3), ())),
}


def heads(length: int, count: int, dim: int = 128) -> Tensor:
    """q, k or v as a projection makes it: rows first in memory."""
    return torch.empty(1, length, count, dim, dtype=BF16, device=CUDA).transpose(1, 2).requires_grad_()


def backward(out: Tensor, *upstream: Tensor) -> tuple[Tensor, ...]:
    """Gradients of the op that made `out`; autograd's engine asks for a device that is there."""
    return out.grad_fn.apply(*upstream)  # type: ignore[union-attr]


def check_attention(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    assert (out.shape, out.dtype, out.stride()[1:]) == (q.shape, q.dtype, q.stride()[1:])
    for tensor, gradient in zip((q, k, v), backward(out, torch.empty_like(out)), strict=False):
        assert (gradient.shape, gradient.dtype, gradient.device) == (tensor.shape, tensor.dtype, tensor.device)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_flash_attention_of_a_pack(layout: PrefixLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    # The table of the layout is read on the host, where the mode of fake tensors allows no reading.
    monkeypatch.setattr("vlmr1_kernels.flash.shared_prefix_attention.layout_of", lambda table: layout)
    with fake_cuda():
        q, k, v = heads(layout.total_length, 16), heads(layout.total_length, 2), heads(layout.total_length, 2)
        with on_stub(), OnCuda(checked=False):
            shared_prefix_attention(q, k, v, layout, impl="flash")  # the first layer copies offsets to the device
        with on_stub(), OnCuda() as ops:
            check_attention(q, k, v, shared_prefix_attention(q, k, v, layout, impl="flash"))
    calls = 2 if any(map(any, layout.branch_lengths)) else 1
    assert (
        Counter(ops.kernels)["_flash_attention_forward"] == Counter(ops.kernels)["_flash_attention_backward"] == calls
    )


def test_flash_attention_of_a_tower() -> None:
    with fake_cuda():
        q, k, v = (heads(4096, 16, 80) for _ in range(3))
        offsets = torch.empty(65, dtype=torch.int32, device=CUDA)
        with on_stub(), OnCuda() as ops:
            check_attention(q, k, v, varlen_attention(q, k, v, offsets, 64, impl="flash"))
    assert {"_flash_attention_forward", "_flash_attention_backward"} <= set(ops.kernels)


@pytest.mark.parametrize("weight_dtype", (BF16, FP32), ids=str)
@pytest.mark.parametrize("loss_type", ("dapo", "gspo"))
def test_linear_grpo_loss(loss_type: Any, weight_dtype: torch.dtype, table: dict[str, Any]) -> None:
    rows, vocabulary, accumulate = 8192, 151_936, weight_dtype == FP32
    with fake_cuda():
        hidden = torch.empty(rows, 2048, dtype=BF16, device=CUDA, requires_grad=True)
        weight = torch.empty(vocabulary, 2048, dtype=weight_dtype, device=CUDA, requires_grad=True)
        ids, facts = torch.empty(rows, dtype=torch.int64, device=CUDA), torch.empty(rows, device=CUDA)
        with on_stub() as launches, OnCuda() as ops:
            options = {"settings": GRPOSettings(loss_type=loss_type, beta=0.1), "accumulate_grad": accumulate}
            given = {"advantages": torch.empty(64, device=CUDA), "old_logp": facts, "ref_logp": facts}
            loss, metrics = linear_grpo_loss(hidden, weight, ids, ids, **given, **options, impl="triton")
            d_hidden, d_weight, *_ = backward(loss, torch.empty_like(loss))
    assert loss.device.type == "cuda" and {value.device.type for value in metrics.values()} == {"cuda"}
    for tensor, gradient in ((hidden, d_hidden), (weight, weight.grad if accumulate else d_weight)):
        assert (gradient.shape, gradient.dtype) == (tensor.shape, tensor.dtype)
    kernels = Counter(ops.kernels)
    table[f"{loss_type}, {weight_dtype}".replace("torch.", "")] = {
        "matrix products": sum(kernels[name] for name in ("mm", "addmm", "addmm_")),
        "Triton": len(launches),
        "all": kernels.total() + len(launches),
    }


REFUSED = {
    "value": lambda x: x.sum().item(),
    "mask": lambda x: x[x > 0],
    "index in host memory": lambda x: x[torch.arange(2)],
    "copy to the device": lambda x: torch.tensor([1.0]).to(CUDA, non_blocking=True),
    "copy to the host": lambda x: x.cpu(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_waits_or_copies_is_refused(name: str) -> None:
    with fake_cuda(), OnCuda():
        x = torch.empty(3, device=CUDA)
        with pytest.raises((AssertionError, DynamicOutputShapeException, DataDependentOutputException)):
            REFUSED[name](x)
